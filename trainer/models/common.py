"""What the architectures share: the two interfaces and a batch norm that spans ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer.collective import all_sum, num_ranks
from trainer.config import ModelConfig


class Generator(nn.Module):
    """``z [n, z_dim]`` -> pictures ``[n, 3, size, size]``, nominally in [-1, 1].

    A network that ``grows`` takes a keyword more, ``level``: the binary logarithm of the pictures' side, fractional
    while a resolution fades in (``GrowConfig.level``). Without it it is fully grown. So does its discriminator.
    """

    grows = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.z_dim = config.z_dim
        self.size = config.size


class Discriminator(nn.Module):
    """Critic values of pictures.

    ``forward`` takes all that a loss needs in one call: one forward per backward is what DistributedDataParallel
    expects (pytorch#175024), and one big batch of reals and fakes is faster than two small ones. Where batch
    statistics must not mix them (``mixes_samples``), they go through one after the other inside the same call.
    """

    mixes_samples = False

    def critic(self, images: Tensor) -> Tensor:
        """Pictures ``[n, 3, size, size]`` -> critic values ``[n]``."""
        raise NotImplementedError

    def forward(self, *batches: Tensor, **growth: float) -> tuple[Tensor, ...]:
        """Critic values of each batch, float32 ``[n]`` each; ``growth`` is the level of networks that grow.

        Reals and fakes share a pass, further batches have one each: what a penalty differentiates twice should hold
        no other pictures.
        """
        passes = [[batch] for batch in batches] if self.mixes_samples else [batches[:2], *([b] for b in batches[2:])]
        critics: list[Tensor] = []
        for together in passes:
            values = self.critic(torch.cat(list(together)), **growth).float()
            critics += values.split([len(batch) for batch in together])
        return tuple(critics)


class _NormaliseOverRanks(torch.autograd.Function):
    """Batch norm's arithmetic (Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and the gradients below it)
    with sums over all ranks, each pass by PyTorch's own kernels for known statistics: written out in single operations
    it takes several times as long. One collective in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x`` normalised, and of all ranks the mean, the variance and the number of values of each channel."""
        values, channels = x.float(), x.shape[1]
        size = values.new_full((1,), x.numel() // channels)  # ranks may hold shares of different size
        own_mean, own_var = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
        sums = all_sum(torch.cat([own_mean * size, (own_var + own_mean.square()) * size, size]))
        mean, square = (sums[:-1] / sums[-1]).split(channels)
        var = (square - mean.square()).clamp(min=0)
        y = functional.batch_norm(values, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, var, sums[-1])
        ctx.eps = eps
        count = sums[-1:]
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable  # gradient penalties go through critics without batch norm
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        values, scale = x.float(), (var + ctx.eps).rsqrt()
        # As if the statistics were constants; then what follows from their being sums over all values.
        direct, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.float(), values, weight, mean, var, mean, scale, False, ctx.eps, [True, True, True]
        )
        by_weight, by_bias = (all_sum(torch.cat([d_weight, d_bias])) / count).split(len(weight))
        slope = -weight * scale.square() * by_weight
        level = -weight * scale * by_bias - slope * mean
        direct.addcmul_(values, slope[:, None, None]).add_(level[:, None, None])
        return direct.to(x.dtype), d_weight, d_bias, None


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch: with several ranks the statistics are summed over all of them.

    So two ranks with batch B train like one process with batch 2B, and an elastic restart with another world size
    does not change the recipe. PyTorch's SyncBatchNorm does the same on CUDA only; this one also runs on gloo.
    """

    over_ranks = True

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.over_ranks and num_ranks() > 1):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y, mean, var, count = _NormaliseOverRanks.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y
