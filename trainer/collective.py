"""Sums over ranks that gradients flow through, twice if need be."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.shared import shared_sums


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Few values ``x``, summed over ranks in the order of ranks; no gradients flow through it. A collective.

    Ranks of one machine on CPUs do it in shared memory. Else values are gathered over gloo and added here: a ring's
    gather has half the rounds of its all-reduce, and what a round costs is waking up. NCCL's all-reduce of few values
    is a tree.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and (sums := shared_sums()):
        return sums.add(x.clone(memory_format=torch.contiguous_format))
    if dist.get_backend() != dist.Backend.GLOO:
        total = x.clone()
        dist.all_reduce(total)
        return total
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts).sum(0)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; since every rank's output depends on every rank's input, so do the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return _SumOverRanks.apply(gradient.contiguous())


def sum_over_ranks(x: Tensor) -> Tensor:
    """``x`` summed over ranks, on every rank; ``x`` itself if there is one. A collective."""
    return _SumOverRanks.apply(x) if num_ranks() > 1 else x


def batch_mean(values: Tensor) -> Tensor:
    """The mean of values ``[n]`` over all ranks, which may hold shares of different size: a scalar. A collective."""
    if num_ranks() == 1:
        return values.mean()
    total, count = sum_over_ranks(torch.stack([values.sum(), values.new_full((), len(values))])).unbind()
    return total / count.detach()
