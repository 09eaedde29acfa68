"""What a trial needs of a cluster, and how many fit at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from catgan.command import UserError


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Need:
    """Of one trial."""

    workers: int
    cpus: int
    gpus: float

    @property
    def per_worker(self) -> dict[str, float]:
        """CPU and GPU of each worker."""
        share: dict[str, float] = {"CPU": max(self.cpus // self.workers, 1)}
        return share | ({"GPU": self.gpus / self.workers} if self.gpus else {})

    def request(self) -> Any:
        """For Tune. Several workers are placed by Ray Train; the trial itself then only waits for them, but Tune cannot
        ask for nothing."""
        from ray import tune

        return tune.PlacementGroupFactory([self.per_worker if self.workers == 1 else {"memory": 1}])

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else ""
        workers = f" for {self.workers} workers" if self.workers > 1 else ""
        return f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}{gpus}{workers}"


def decide_need(
    nodes: Sequence[Node], workers: int, readers: int, trials: int, cpus: int | None, gpus: float | None
) -> Need:
    """What each trial gets: what is given, else a GPU per worker where there are any, and a CPU for each worker and
    each reader; without GPUs an equal share of all CPUs if that is more.

    Raises:
        UserError: GPUs are asked for and there are none.
    """
    all_gpus = sum(node.gpus for node in nodes)
    if gpus and not all_gpus:
        raise UserError(f"--gpus-per-trial {gpus:g}: there is no GPU; leave it out")
    gpus = gpus if gpus is not None else float(workers if all_gpus else 0)
    if cpus is None:
        cpus = workers * (1 + readers)
        if not gpus and workers == 1:
            largest = max(node.cpus for node in nodes)
            cpus = max(1, min(max(cpus, sum(node.cpus for node in nodes) // trials), largest))
    elif cpus < workers:
        raise UserError(f"--cpus-per-trial {cpus}: give at least one for each of {workers} workers")
    return Need(workers, cpus, gpus)


def num_at_once(need: Need, nodes: Sequence[Node]) -> int:
    """How many trials fit at the same time.

    Raises:
        UserError: none does; says what would.
    """
    share = need.per_worker
    slots = sum(_slots(node, share["CPU"], share.get("GPU", 0)) for node in nodes)
    if at_once := slots // need.workers:
        return at_once
    machines = ", ".join(f"{node.cpus} CPUs and {node.gpus} GPUs" for node in nodes[:4])
    best = max(nodes, key=lambda node: (node.gpus > 0) == (need.gpus > 0) and node.cpus)
    fitting = f"--workers-per-trial {slots}" if slots else f"--workers-per-trial 1 --cpus-per-trial {max(best.cpus, 1)}"
    if need.gpus and not slots and need.gpus / need.workers > max(node.gpus for node in nodes):
        fitting += f" --gpus-per-trial {max(node.gpus for node in nodes)}"
    raise UserError(
        f"no trial fits: each needs {need}, and there are {len(nodes)} machine(s) with {machines}; {fitting} fits"
    )


def _slots(node: Node, cpus: float, gpus: float) -> int:
    """Workers that fit on a machine. Parts of a GPU are of one GPU."""
    by_cpu = int(node.cpus // cpus)
    if not gpus:
        return by_cpu
    by_gpu = node.gpus * math.floor(1 / gpus + 1e-9) if gpus <= 1 else int(node.gpus // gpus)
    return min(by_cpu, by_gpu)
