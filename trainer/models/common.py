"""The interfaces of the two networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.batchnorm import separate_statistics


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
            with separate_statistics(self, sizes):
                values = self.critic(torch.cat(list(together)), **growth).float()
            critics += values.split(sizes)
        return tuple(critics)
