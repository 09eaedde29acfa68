"""How long gloo takes for an all-reduce between two processes of this machine: latency and bandwidth of the model."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import count, machine, of_two_processes, table

from infer.command import Parser, run_command

NAME = "all_reduce.py"
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)  # bytes

_DESCRIPTION = """\
Times torch.distributed.all_reduce of float32 over gloo on loopback, two processes of one thread each, and fits
`seconds = latency + bytes / bandwidth`, errors relative to the time. The fastest of `--repeats` counts, since other
processes can only slow it down.

examples:
  python benchmarks/all_reduce.py
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--repeats", type=count, default=50, metavar="N", help="of each size (default: %(default)s)")
    a = parser.parse_args(argv)
    seconds: list[float] = of_two_processes(_work, a.repeats)
    latency, bandwidth = fit(SIZES, seconds)
    table(("bytes", "ms"), [(size, f"{1e3 * s:.2f}") for size, s in zip(SIZES, seconds, strict=True)])
    return {
        "latency_ms": round(1e3 * latency, 3),
        "megabytes_per_second": round(bandwidth / 1e6, 1),
        "milliseconds": {size: round(1e3 * s, 3) for size, s in zip(SIZES, seconds, strict=True)},
        "machine": machine(),
    }


def fit(sizes: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second, by least squares of the relative errors."""
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
    return float(latency), float(1 / slope)


def _work(rank: int, address: str, queue: Any, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    fastest = []
    for size in SIZES:
        values = torch.zeros(size // 4)
        times = []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - began)
        fastest.append(min(times))
    if rank == 0:
        queue.put(fastest)
    dist.destroy_process_group()


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
