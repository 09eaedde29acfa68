"""How the speed of a step holds when a second worker joins, each with one thread and a batch of its own."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from measure import count, machine, of_two_processes, positive, quartiles, table
from torch import Tensor

from catgan.command import Parser, run_command, say
from trainer.config import Config
from trainer.data.build.progress import progress
from trainer.distributed.collectives import sum_over_ranks
from trainer.launch.worker import keep_freed_memory
from trainer.models.batchnorm import BatchNorm
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.step import GAN

NAME = "weak_scaling.py"
KINDS = ("alone", "independent", "in_step", "together")

_DESCRIPTION = """\
Two processes of one thread each take steps of a recipe on fixed pictures, in turns of some seconds:

  alone        the first takes steps as a single worker, the second sleeps
  independent  both do so at once, without a word between them: what the machine itself takes away
  in_step      the same, but they add up a single number before each step: what waiting for each other takes away
  together     both as ranks of one training, over gloo on loopback: gradients and batch norm span both

  ratio        time of a step alone over that together, the median of the rounds with its quartiles; 1 is perfect
  independent, in_step  the same for these

Since a machine's speed drifts within a minute, the kinds are neighbours in time, in the same two processes.

examples:
  python benchmarks/weak_scaling.py
  python benchmarks/weak_scaling.py --recipe r3gan-cpu-64 --batch 64
"""

Block = tuple[float, float]
"""Milliseconds and CPU milliseconds of a step."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    parser.add_argument("--batch", type=count, metavar="N", help="of each worker (default: the recipe's batch)")
    parser.add_argument("--seconds", type=positive, default=1.5, help="about, of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=30, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    config = replace(config, batch=a.batch or config.batch)
    say(f"{config.recipe}, {config.batch} pictures a worker, {a.repeats} rounds of {len(KINDS)} turns")
    blocks: dict[str, list[Block]] = of_two_processes(_work, config, a.seconds, a.repeats)
    ratios = _ratios(blocks["alone"], blocks["together"])
    medians = {kind: [statistics.median(values) for values in zip(*blocks[kind], strict=True)] for kind in KINDS}
    table(("", "ms/step", "CPU ms"), [(kind, *(f"{value:.1f}" for value in medians[kind])) for kind in KINDS])
    return {
        "recipe": config.recipe,
        "batch_per_worker": config.batch,
        "step_ms": {kind: round(medians[kind][0], 2) for kind in KINDS},
        "cpu_ms": {kind: round(medians[kind][1], 2) for kind in KINDS},
        "ratio": ratios[1],
        "ratio_quartiles": ratios,
        **{kind: _ratios(blocks["alone"], blocks[kind])[1] for kind in ("independent", "in_step")},
        "machine": machine(),
    }


def _ratios(ours: list[Block], others: list[Block]) -> list[float]:
    """Quartiles of the time of ``ours`` over that of ``others``, round by round."""
    return quartiles([a / b for (a, _), (b, _) in zip(ours, others, strict=True)])


def _work(rank: int, address: str, queue: Any, config: Config, seconds: float, repeats: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    cpu = torch.device("cpu")
    side = config.model.size
    reals = torch.randint(0, 256, (config.batch, 3, side, side), dtype=torch.uint8)
    single = GAN(config, cpu)
    pair = GAN(replace(config, batch=2 * config.batch), cpu, world_size=2)
    steps = torch.ones(())
    if rank == 0:
        BatchNorm.over_ranks = False
        _steps(single, reals, 2)
        steps += seconds / (_steps(single, reals, 2)[0] / 1000) // 1
    dist.broadcast(steps, 0)
    blocks: dict[str, list[Block]] = {kind: [] for kind in KINDS}
    rounds = range(repeats + 1)  # the first one warms up
    for turn in progress(rounds, "turns", "round", len(rounds)) if rank == 0 else rounds:
        for kind in KINDS:
            dist.barrier()
            BatchNorm.over_ranks = kind == "together"
            if rank and kind == "alone":
                continue
            gan = pair if kind == "together" else single
            block = _steps(gan, reals, int(steps), meet=kind == "in_step")
            if turn:
                blocks[kind].append(block)
    if rank == 0:
        queue.put(blocks)
    dist.barrier()
    dist.destroy_process_group()


def _steps(gan: GAN, reals: Tensor, number: int, meet: bool = False) -> Block:
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(number):
        if meet:
            sum_over_ranks(torch.zeros(1))
        gan.step(reals, 0)
    return 1000 * (time.perf_counter() - began) / number, 1000 * (time.process_time() - cpu_began) / number


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
