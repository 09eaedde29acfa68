"""Batch norm over the global batch, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.distributed.collectives import sum_over_ranks, world_size


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch: with several ranks the statistics are computed over all of them.

    So two ranks with batch B train like one process with batch 2B, and an elastic restart with another world size does
    not change the recipe. PyTorch's SyncBatchNorm does the same on CUDA only, and waits for the device in each layer.
    """

    over_ranks = True
    sizes: list[int] | None = None
    """In training, the input consists of batches of these sizes with statistics of their own; None: one batch. Set by
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
        normalise = _NormaliseOnCUDA if input.is_cuda else _NormaliseOverRanks
        y, means, variances, counts = normalise.apply(input, sizes, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += len(sizes)
            for mean, var in zip(means, variances * (counts / (counts - 1)), strict=True):
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        return y


@contextmanager
def separate_statistics(module: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Inside, each batch norm of ``module`` splits its input into batches of these sizes and normalises each with its
    own statistics."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.sizes = sizes
    try:
        yield
    finally:
        for norm in norms:
            norm.sizes = None


class _NormaliseOverRanks(torch.autograd.Function):
    """Batch norm (Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and the gradients below it) with sums
    over all ranks: one collective in each direction for all batches of the input.

    Written as few operations: in small networks each costs more than the work it does. In the equations below m, v are
    mean and variance, N the number of values of a channel over all ranks, w, b the affine parameters, and
    s = (v + eps)^(-1/2), xhat = (x - m) s, y = w xhat + b.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns y, and over all ranks m and v ``[batches, channels]`` and N ``[batches, 1]``."""
        parts = x.float().split(sizes)
        mean, var, count = _moments_over_ranks(parts)
        inverse = (var + eps).rsqrt_()
        scale = weight * inverse  # y = (w s) x + (b - w s m)
        shift = torch.addcmul(bias, scale, mean, value=-1)
        y = torch.empty_like(x, dtype=torch.float32)
        for out, part, a, b in zip(y.split(sizes), parts, _per_map(scale), _per_map(shift), strict=True):
            torch.addcmul(b, part, a, out=out)
        ctx.save_for_backward(x, mean, inverse, scale, count)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable  # gradient penalties are refused for discriminators with batch norm
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, mean, inverse, scale, count = ctx.saved_tensors
        parts, gradients = x.float().split(ctx.sizes), gradient.float().split(ctx.sizes)
        # dL/db = sum g;  dL/dw = sum g xhat = (sum g x - m sum g) s. DDP averages these over ranks.
        d_biases = torch.stack([g.sum((0, 2, 3)) for g in gradients])
        products = torch.stack([(part * g).sum((0, 2, 3)) for part, g in zip(parts, gradients, strict=True)])
        d_weights = torch.addcmul(products, mean, d_biases, value=-1).mul_(inverse)
        # dL/dx = w s (g - sum g / N - xhat sum(g xhat) / N), sums over ranks, written as (w s) g + slope x + offset.
        mean_gx, mean_g = (sum_over_ranks(torch.cat([d_weights, d_biases], dim=1)) / count).chunk(2, dim=1)
        slope = -scale * inverse * mean_gx
        offset = -scale * mean_g - slope * mean
        d_x = torch.empty_like(x, dtype=torch.float32)
        factors = (_per_map(f) for f in (scale, slope, offset))
        for out, part, g, a, b, c in zip(d_x.split(ctx.sizes), parts, gradients, *factors, strict=True):
            torch.addcmul(c, g, a, out=out).addcmul_(part, b)
        return d_x.to(x.dtype), None, d_weights.sum(0), d_biases.sum(0), None


class _NormaliseOnCUDA(torch.autograd.Function):
    """``_NormaliseOverRanks`` with the kernels of PyTorch's SyncBatchNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        parts = x.split(sizes)
        mean, var, count = _moments_over_ranks(parts)
        inverse = (var + eps).rsqrt_()
        normalised = [
            torch.batch_norm_elemt(part, weight, bias, m, s, eps)
            for part, m, s in zip(parts, mean, inverse, strict=True)
        ]
        ctx.save_for_backward(x, weight, mean, inverse, count.to(torch.int32))
        ctx.sizes = sizes
        ctx.mark_non_differentiable(mean, var, count)
        return torch.cat(normalised), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        per_batch = list(zip(gradient.split(ctx.sizes), x.split(ctx.sizes), mean, inverse, strict=True))
        # Of each batch, [channels] each: sum g, sum g (x - m), dL/dw, dL/db.
        reduced = [torch.batch_norm_backward_reduce(*tensors, weight, True, True, True) for tensors in per_batch]
        sum_g, sum_gx = sum_over_ranks(torch.stack([torch.stack(values[:2]) for values in reduced])).unbind(1)
        d_x = [
            torch.batch_norm_backward_elemt(*tensors, weight, *sums)
            for tensors, *sums in zip(per_batch, sum_g, sum_gx, count, strict=True)
        ]
        d_weight, d_bias = (torch.stack([values[i] for values in reduced]).sum(0) for i in (2, 3))
        return torch.cat(d_x), None, d_weight, d_bias, None


def _moments_over_ranks(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each batch over all ranks: mean and variance ``[batches, channels]``, number of values of a channel
    ``[batches, 1]``, all float32."""
    local = []  # sum of x, sum of x^2, number of values: ranks may hold shares of different size
    for part in parts:
        mean, var = torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0)
        size = mean.new_full((1,), part.numel() // part.shape[1])
        local.append(torch.cat([mean * size, var.addcmul_(mean, mean).mul_(size), size]))
    sums = sum_over_ranks(torch.stack(local))
    count = sums[:, -1:]
    mean, square = (sums[:, :-1] / count).chunk(2, dim=1)
    return mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0), count  # E[x^2] - m^2


def _per_map(values: Tensor) -> tuple[Tensor, ...]:
    """``[batches, channels]`` -> for each batch ``[channels, 1, 1]``, to multiply with its feature maps."""
    return values[:, :, None, None].unbind()
