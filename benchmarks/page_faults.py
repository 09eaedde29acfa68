"""How fast a step is when its process keeps freed memory, as our trainings on CPUs do, and when it does not."""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from measure import count, machine, of_two_processes, quartiles, table

from catgan.command import Parser, run_command
from trainer.data.build.progress import progress
from trainer.launch.worker import keep_freed_memory
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.step import GAN

NAME = "page_faults.py"
_WARM_UP = 10  # steps; memory is still growing in the first ones

_DESCRIPTION = """\
Two processes of one thread each take steps of a recipe on fixed pictures, in turns: one with the C library's defaults,
one after trainer.launch.worker.keep_freed_memory.

  ratio    speed with kept memory over that without, the median of the rounds with its quartiles; above 1 is faster
  faults   page faults of a step, of either

examples:
  python benchmarks/page_faults.py
  python benchmarks/page_faults.py --recipe r3gan-cpu-64 --steps 2
"""


Turn = tuple[float, float]
"""Milliseconds and page faults of a step."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=5, metavar="N", help="of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=60, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    default: list[Turn] = []
    keeping: list[Turn] = []
    for keeper in (0, 1):  # so that neither process has a part of its own in it
        turns: list[list[Turn]] = of_two_processes(_work, keeper, a.recipe, a.steps, math.ceil(a.repeats / 2))
        keeping += turns[keeper]
        default += turns[1 - keeper]
    ratios = quartiles([d / k for (d, _), (k, _) in zip(default, keeping, strict=True)])
    ways = {"default": default, "keeping": keeping}
    medians = {way: [statistics.median(values) for values in zip(*turns, strict=True)] for way, turns in ways.items()}
    table(("", "ms/step", "faults"), [(way, f"{ms:.1f}", f"{faults:.0f}") for way, (ms, faults) in medians.items()])
    return {
        "recipe": a.recipe,
        "ratio": ratios[1],
        "ratio_quartiles": ratios,
        "step_ms": {way: round(ms, 2) for way, (ms, _) in medians.items()},
        "faults": {way: round(faults, 1) for way, (_, faults) in medians.items()},
        "machine": machine(),
    }


def _work(rank: int, address: str, queue: Any, keeper: int, recipe: str, steps: int, repeats: int) -> None:
    torch.set_num_threads(1)
    if rank == keeper:
        keep_freed_memory()
    config = resolve(recipe, None, gpu=False)
    gan, side = GAN(config, torch.device("cpu")), config.model.size
    reals = torch.randint(0, 256, (config.batch, 3, side, side), dtype=torch.uint8)
    # No process group: its ranks would be those of one training.
    store = dist.TCPStore("127.0.0.1", int(address.rpartition(":")[2]), world_size=2, is_master=rank == 0)
    found: list[list[Turn]] = [[], []]
    _steps(gan, reals, _WARM_UP)
    rounds = range(repeats)
    for i in progress(rounds, "turns", "round", len(rounds)) if rank == 0 else rounds:
        for whose in (0, 1) if i % 2 else (1, 0):
            if rank == whose:
                store.set(f"{i}/{whose}", json.dumps(_steps(gan, reals, steps)))
            found[whose].append(json.loads(store.get(f"{i}/{whose}")))  # waits for the other one
    if rank == 0:
        queue.put(found)
    store.set(f"end/{rank}", "")
    store.wait([f"end/{1 - rank}"])


def _steps(gan: GAN, reals: torch.Tensor, number: int) -> Turn:
    began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        gan.step(reals, 0)
    seconds = time.perf_counter() - began
    return 1000 * seconds / number, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / number


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
