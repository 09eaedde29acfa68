"""The few collectives that metrics need; without ``torch.distributed`` they concern a world of one process."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over ranks, on every rank, on the device that ``values`` is on; one collective."""
    if not dist.is_initialized():
        return values
    shared = values.to(_device(), copy=True)
    dist.all_reduce(shared)
    return shared.to(values.device)


def from_rank_zero(value: T) -> T:
    """Rank 0's ``value`` on every rank; what the others pass is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def _device() -> torch.device:
    """Where the backend communicates: NCCL knows GPUs only, Gloo is at home in main memory."""
    return torch.device("cuda" if "nccl" in str(dist.get_backend()) else "cpu")
