"""What the architectures share: the two interfaces and a batch norm that spans ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    expects (pytorch#175024), and one big batch of reals and fakes is faster than two small ones. ``BatchNorm`` keeps
    their statistics apart. Where anything else mixes the pictures of a batch (``mixes_samples``), reals and fakes go
    through one after the other inside the same call.
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
            sizes = [len(batch) for batch in together]
            with apart(self, sizes):
                values = self.critic(torch.cat(list(together)), **growth).float()
            critics += values.split(sizes)
        return tuple(critics)


@contextmanager
def apart(module: nn.Module, sizes: list[int]) -> Iterator[None]:
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
    with sums over all ranks, each pass by PyTorch's own kernels for known statistics: written out in single operations
    it takes several times as long. One collective in each direction, for all batches of the input."""

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
            own.append(torch.cat([mean * size, (var + mean.square()) * size, size]))
        sums = all_sum(torch.stack(own))
        count = sums[:, -1:]
        mean, square = (sums[:, :-1] / count).chunk(2, dim=1)
        var = (square - mean.square()).clamp(min=0)
        y = _joined(
            functional.batch_norm(part, m, v, weight, bias, training=False, eps=eps)
            for part, m, v in zip(parts, mean, var, strict=True)
        )
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.sizes, ctx.eps = sizes, eps
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable  # gradient penalties go through critics without batch norm
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        parts, gradients = x.float().split(ctx.sizes), gradient.float().split(ctx.sizes)
        scale = (var + ctx.eps).rsqrt()
        # As if the statistics were constants; then what follows from their being sums over all values.
        direct, d_weights, d_biases = zip(
            *(
                torch.ops.aten.native_batch_norm_backward(
                    g, part, weight, m, v, m, s, False, ctx.eps, [True, True, True]
                )
                for g, part, m, v, s in zip(gradients, parts, mean, var, scale, strict=True)
            ),
            strict=True,
        )
        own = torch.stack([torch.stack(d_weights), torch.stack(d_biases)])
        by_weight, by_bias = all_sum(own) / count
        slopes = -weight * scale.square() * by_weight
        levels = -weight * scale * by_bias - slopes * mean
        for d, part, slope, level in zip(direct, parts, slopes, levels, strict=True):
            d.addcmul_(part, slope[:, None, None]).add_(level[:, None, None])
        d_weight, d_bias = own.sum(1)
        return _joined(direct).to(x.dtype), None, d_weight, d_bias, None


def _joined(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    return torch.cat([first, *others]) if others else first


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch: with several ranks the statistics are summed over all of them.

    So two ranks with batch B train like one process with batch 2B, and an elastic restart with another world size
    does not change the recipe. PyTorch's SyncBatchNorm does the same on CUDA only; this one also runs on gloo.
    """

    over_ranks = True
    sizes: list[int] | None = None
    """In training the input is batches of these sizes, each with statistics of its own, or one; see ``apart``."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        sizes = self.sizes or [len(input)]
        if not (self.over_ranks and num_ranks() > 1):
            return _joined(super(BatchNorm, self).forward(batch) for batch in input.split(sizes))
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y, means, variances, counts = _NormaliseOverRanks.apply(input, sizes, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += len(sizes)
            for mean, var, count in zip(means, variances, counts, strict=True):
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y
