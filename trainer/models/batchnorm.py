"""Batch norm over the global batch, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.distributed.collectives import sum_over_ranks, world_size


@contextmanager
def separate_statistics(module: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Batch norms in ``module`` take their input inside as batches of these sizes, one after the other."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.sizes = sizes
    try:
        yield
    finally:
        for norm in norms:
            norm.sizes = None


class _NormaliseOverRanks(torch.autograd.Function):
    """Batch norm's arithmetic (Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and the gradients below it)
    with sums over all ranks: one collective in each direction, for all batches of the input. In small networks each
    operation costs more than what it works on, so there are few."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x`` normalised, and of all ranks the mean and variance of each channel, ``[batches, channels]``, and the
        number of values of a channel in each batch, ``[batches, 1]``."""
        parts = x.float().split(sizes)
        own = []
        for part in parts:
            mean, var = torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0)
            size = mean.new_full((1,), part.numel() // part.shape[1])  # ranks may hold shares of different size
            own.append(torch.cat([mean * size, var.addcmul_(mean, mean).mul_(size), size]))
        sums = sum_over_ranks(torch.stack(own))
        count = sums[:, -1:]
        mean, square = (sums[:, :-1] / count).chunk(2, dim=1)
        var = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
        inverse = (var + eps).rsqrt_()
        scale = weight * inverse
        shift = torch.addcmul(bias, scale, mean, value=-1)
        y = torch.empty_like(x, dtype=torch.float32)
        for to, part, a, b in zip(y.split(sizes), parts, _factors(scale), _factors(shift), strict=True):
            torch.addcmul(b, part, a, out=to)
        ctx.save_for_backward(x, mean, inverse, scale, count)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable  # gradient penalties go through critics without batch norm
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, mean, inverse, scale, count = ctx.saved_tensors
        parts, gradients = x.float().split(ctx.sizes), gradient.float().split(ctx.sizes)
        d_biases = torch.stack([g.sum((0, 2, 3)) for g in gradients])
        products = torch.stack([(part * g).sum((0, 2, 3)) for part, g in zip(parts, gradients, strict=True)])
        d_weights = torch.addcmul(products, mean, d_biases, value=-1).mul_(inverse)
        by_weight, by_bias = (sum_over_ranks(torch.cat([d_weights, d_biases], dim=1)) / count).chunk(2, dim=1)
        slope = -scale * inverse * by_weight
        level = -scale * by_bias - slope * mean
        d_x = torch.empty_like(x, dtype=torch.float32)
        factors = (_factors(f) for f in (scale, slope, level))
        for to, part, g, a, b, c in zip(d_x.split(ctx.sizes), parts, gradients, *factors, strict=True):
            torch.addcmul(c, g, a, out=to).addcmul_(part, b)
        return d_x.to(x.dtype), None, d_weights.sum(0), d_biases.sum(0), None


def _factors(values: Tensor) -> tuple[Tensor, ...]:
    """``[batches, channels]``, of each batch in a shape to be multiplied with its maps."""
    return values[:, :, None, None].unbind()


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch: with several ranks the statistics are summed over all of them.

    So two ranks with batch B train like one process with batch 2B, and an elastic restart with another world size
    does not change the recipe. PyTorch's SyncBatchNorm does the same on CUDA only; this one also runs on gloo.
    """

    over_ranks = True
    sizes: list[int] | None = None
    """In training the input is batches of these sizes, each with statistics of its own, or one; see
    ``separate_statistics``."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        sizes = self.sizes or [len(input)]
        if not (self.over_ranks and world_size() > 1):
            parts = [super(BatchNorm, self).forward(batch) for batch in input.split(sizes)]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y, means, variances, counts = _NormaliseOverRanks.apply(input, sizes, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += len(sizes)
            for mean, var in zip(means, variances * (counts / (counts - 1)), strict=True):
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        return y
