"""The environment of a training: this process alone, or a worker of Ray Train. The loop sees only ``Context``."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch

from trainer.distributed.collectives import broadcast

Request = Literal["save", "stop"]
"""save: checkpoint now, since a node is about to be preempted. stop: checkpoint, then end the training."""


class Context(Protocol):
    """The environment of one rank."""

    rank: int
    world_size: int
    device: torch.device
    node: int
    """Number of its machine, from 0."""
    local_rank: int
    """Its rank among those of its machine."""

    def request(self) -> Request | None:
        """Check for a stop or preemption request. Collective: every rank calls it at each tick, and all get the same
        answer."""
        ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Report progress to the cluster. Collective: every rank must call it, and it is a barrier."""
        ...


class LocalContext:
    """One process without a cluster, on a GPU if there is one."""

    rank = node = local_rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_stopping = False

    def stop(self) -> None:
        """Request that training ends at the next tick."""
        self.is_stopping = True

    def request(self) -> Request | None:
        return "stop" if self.is_stopping else None

    def report(self, metrics: dict[str, Any]) -> None:
        pass


class RayContext:
    """A worker of Ray Train (V2).

    Args:
        link: the actor through which the driver requests the end of training, see ``trainer.launch.link``.
    """

    def __init__(self, link: Any) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.node, self.local_rank = context.get_node_rank(), context.get_local_rank()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a setting of the thread; NCCL's collectives run on it
        self._link = link
        self._leaving: frozenset[str] = frozenset()

    def request(self) -> Request | None:
        import ray
        import ray.train

        if broadcast(self.rank == 0 and ray.get(self._link.is_stop_requested.remote())):
            return "stop"
        # Ray broadcasts rank 0's answer, so this too is the same on all ranks.
        preemption = ray.train.get_preemption_info()
        leaving = frozenset(preemption.preempted_node_ids if preemption else ())
        is_new = not leaving <= self._leaving
        self._leaving |= leaving
        return "save" if is_new else None

    def report(self, metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)
