"""Collectives over the ranks of a training. Without ``torch.distributed`` there is one rank and each is trivial."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.shared_sums import shared_sums

T = TypeVar("T")

_FEW = 1 << 16  # values that each rank gathers and adds by itself, over gloo


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: T) -> T:
    """Rank 0's ``value``, any picklable object, on every rank; what the others pass is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def gather(value: T) -> list[T]:
    """``value``, any picklable object, of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The element-wise sum of ``x`` over ranks, on every rank, on the device of ``x``; no gradients flow through it.

    Ranks of one machine on CPUs add float32 in shared memory. Over gloo a few values are gathered and added by each
    rank: a ring all-gather has half the rounds of a ring all-reduce, and latency is what counts. Both add in the order
    of ranks, so that all ranks get the same bits. With one rank the result is ``x`` itself.
    """
    if world_size() == 1:
        return x
    if x.dtype == torch.float32 and x.device.type == "cpu" and (sums := shared_sums()):
        return sums.add(x.clone(memory_format=torch.contiguous_format))
    if dist.get_backend() == dist.Backend.GLOO and x.numel() <= _FEW:
        local = x.to(_device()).contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.stack(parts).sum(0, dtype=x.dtype).to(x.device)
    total = x.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The element-wise mean of ``x`` over ranks, see ``sum_over_ranks``."""
    return sum_over_ranks(x) / world_size()


class _DifferentiableSum(torch.autograd.Function):
    """Every rank's output depends on every rank's input, so the gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return _DifferentiableSum.apply(gradient.contiguous())


def differentiable_sum(x: Tensor) -> Tensor:
    """``sum_over_ranks`` that gradients flow through, twice if need be."""
    return _DifferentiableSum.apply(x) if world_size() > 1 else x


def batch_mean(values: Tensor) -> Tensor:
    """The mean of values ``[n]`` over all ranks, which may hold shares of different size: a scalar. Differentiable."""
    if world_size() == 1:
        return values.mean()
    total, count = differentiable_sum(torch.stack([values.sum(), values.new_full((), len(values))])).unbind()
    return total / count.detach()


def _device() -> torch.device:
    """Where the backend communicates: NCCL on the current GPU, gloo in main memory."""
    return torch.device("cuda" if "nccl" in str(dist.get_backend()) else "cpu")
