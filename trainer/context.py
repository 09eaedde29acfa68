"""Where a training runs: in this process, or in the workers of Ray Train. The loop sees only ``Context``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import checkpoint


class Context(Protocol):
    """What the loop needs to know of the world."""

    rank: int
    world_size: int
    device: torch.device

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the checkpoint to continue from, for as long as the context is open; None: start afresh."""
        ...

    def report(self, metrics: dict[str, Any], folder: Path | None, name: str) -> None:
        """Persist the checkpoint in ``folder`` as ``name``. Every rank calls this equally often (it is a barrier);
        rank 0 passes the folder, which is consumed, the others None."""
        ...


class LocalContext:
    """One process, no cluster."""

    rank = 0
    world_size = 1

    def __init__(self, run_dir: Path, resume_from: Path | None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.run_dir, self.resume_from = run_dir, resume_from

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield self.resume_from

    def report(self, metrics: dict[str, Any], folder: Path | None, name: str) -> None:
        assert folder is not None
        final = self.run_dir / name
        shutil.rmtree(final, ignore_errors=True)
        folder.replace(final)
        for old in checkpoint.find_all(self.run_dir)[: -checkpoint.NUM_TO_KEEP]:
            shutil.rmtree(old)


class RayContext:
    """A worker of Ray Train (V2)."""

    def __init__(self, resume_from: Path | None) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.resume_from = resume_from

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        # After a lost worker Ray Train restarts the loop in this same attempt: its newest checkpoint is then newer
        # than the one the driver found when it started.
        reported = ray.train.get_checkpoint()
        if reported is None or (self.resume_from is not None and self.resume_from.name > Path(reported.path).name):
            yield self.resume_from
        else:
            with reported.as_directory() as folder:
                yield Path(folder)

    def report(self, metrics: dict[str, Any], folder: Path | None, name: str) -> None:
        import ray.train

        saved = ray.train.Checkpoint.from_directory(str(folder)) if folder is not None else None
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=name)
        if folder is not None:
            shutil.rmtree(folder)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The element-wise mean over ranks, in place; one collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
