"""Where a training runs: in this process, or in the workers of Ray Train. The loop sees only ``Context``."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch

from trainer.distributed.collectives import broadcast

Notice = Literal["save", "stop"]
"""save: this machine may go soon, a checkpoint is wanted now. stop: that, and the end."""


class Context(Protocol):
    """What the loop needs to know of the world."""

    rank: int
    world_size: int
    device: torch.device

    def notice(self) -> Notice | None:
        """What the surroundings ask for. Every rank calls this at each tick, and all get the same answer."""
        ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell the cluster how far training is. Every rank calls this equally often: it is a barrier."""
        ...


class LocalContext:
    """One process, no cluster."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_stopping = False

    def stop(self) -> None:
        """Have training end at the next tick."""
        self.is_stopping = True

    def notice(self) -> Notice | None:
        return "stop" if self.is_stopping else None

    def report(self, metrics: dict[str, Any]) -> None:
        pass


class RayContext:
    """A worker of Ray Train (V2).

    Args:
        bell: the actor that the driver rings to end training, see ``launch.run_on_ray``.
    """

    def __init__(self, bell: Any) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._bell = bell
        self._leaving: frozenset[str] = frozenset()

    def notice(self) -> Notice | None:
        import ray
        import ray.train

        if broadcast(self.rank == 0 and ray.get(self._bell.is_rung.remote())):
            return "stop"
        # Ray asks rank 0 alone, so this too is the same on all ranks.
        preemption = ray.train.get_preemption_info()
        leaving = frozenset(preemption.preempted_node_ids if preemption else ())
        is_news = not leaving <= self._leaving
        self._leaving |= leaving
        return "save" if is_news else None

    def report(self, metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)
