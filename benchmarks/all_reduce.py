"""How long a sum over two processes of this machine takes: gloo, with its figures for the model, and shared memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import count, machine, of_two_processes, table
from torch import Tensor

from catgan.command import Parser, UserError, run_command
from trainer.distributed import shared_memory as shm
from trainer.distributed.shared_sums import shared_sums

NAME = "all_reduce.py"
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)  # bytes
WAYS = ("gloo", "shared")

_DESCRIPTION = """\
Times the sum of float32 over two processes of one thread each, in turns: torch.distributed.all_reduce over gloo on
loopback, and trainer.distributed.shared_sums, which ranks of one machine use.

  ratio      gloo's time over ours, the medians, the lowest of all sizes
  added_ms   what a sum of 4 KiB adds to multiplications of some milliseconds between one and the next, as batch norm's
             sums lie between a network's layers; `ratio_added` is gloo's over ours
  latency_ms, megabytes_per_second
             gloo's `seconds = latency + bytes / bandwidth`, errors relative to the time; the fastest of the repeats
             counts here, since other processes can only slow it down

examples:
  python benchmarks/all_reduce.py
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--repeats", type=count, default=50, metavar="N", help="of each size (default: %(default)s)")
    a = parser.parse_args(argv)
    times: dict[str, list[list[float]]]
    between: dict[str, list[float]]
    times, between = of_two_processes(_work, a.repeats)
    latency, bandwidth = fit(SIZES, [min(t) for t in times["gloo"]])
    medians = {way: [1e3 * statistics.median(t) for t in times[way]] for way in WAYS}
    table(("bytes", *WAYS), [(s, *(f"{medians[w][i]:.2f} ms" for w in WAYS)) for i, s in enumerate(SIZES)])
    added = {way: 1e3 * (statistics.median(between[way]) - statistics.median(between["none"])) for way in WAYS}
    return {
        "ratio": round(min(g / s for g, s in zip(*medians.values(), strict=True)), 3),
        "milliseconds": {way: dict(zip(SIZES, (round(m, 3) for m in medians[way]), strict=True)) for way in WAYS},
        "added_ms": {way: round(ms, 3) for way, ms in added.items()},
        "ratio_added": round(added["gloo"] / added["shared"], 3) if added["shared"] > 0 else None,
        "latency_ms": round(1e3 * latency, 3),
        "megabytes_per_second": round(bandwidth / 1e6, 1),
        "machine": machine(),
    }


def fit(sizes: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second, by least squares of the relative errors."""
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
    return float(latency), float(1 / slope)


def _work(rank: int, address: str, queue: Any, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    sums = shared_sums()
    if sums is None:
        raise UserError(f"two processes find no shared memory: {shm.FOLDER} has no room")
    ways: dict[str, Callable[[Tensor], Any]] = {"gloo": dist.all_reduce, "shared": sums.add}
    times: dict[str, list[list[float]]] = {way: [[] for _ in SIZES] for way in ways}
    for i, size in enumerate(SIZES):
        values = torch.zeros(size // 4)
        for _ in range(repeats):
            for way, add in ways.items():
                dist.barrier()
                began = time.perf_counter()
                add(values)
                times[way][i].append(time.perf_counter() - began)
    between: dict[str, list[float]] = {way: [] for way in ("none", *ways)}
    matrix, values = torch.randn(512, 512), torch.zeros(1024)
    for _ in range(repeats):
        for way, seconds in between.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(10):
                matrix @ matrix
                ways.get(way, _nothing)(values)
            seconds.append((time.perf_counter() - began) / 10)
    if rank == 0:
        queue.put((times, between))
    dist.barrier()
    dist.destroy_process_group()


def _nothing(values: Tensor) -> None:
    pass


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
