"""What the architectures share: the two interfaces and a batch norm that spans ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.collective import num_ranks, sum_over_ranks
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


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch: with several ranks the statistics are summed over all of them.

    So two ranks with batch B train like one process with batch 2B, and an elastic restart with another world size
    does not change the recipe. PyTorch's SyncBatchNorm does the same on CUDA only; this one also runs on gloo and
    can be differentiated twice, which the gradient penalties need.
    """

    over_ranks = True

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.over_ranks and num_ranks() > 1):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x = input.float()
        channels = x.shape[1]
        size = x.new_full((1,), x.numel() // channels)  # ranks may hold shares of different size
        sums = sum_over_ranks(torch.cat([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3)), size]))
        count = sums[-1].detach()
        mean, square = (sums[:-1] / count).split(channels)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)
