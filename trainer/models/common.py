"""The interfaces of the two networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.distributed.collectives import differentiable_sum
from trainer.models.batchnorm import separate_statistics


class Generator(nn.Module):
    """``z [n, z_dim]`` -> images ``[n, 3, size, size]``, nominally in [-1, 1].

    One with ``classes`` also takes the keyword ``label``, int64 ``[n]``, the number of each image's class.

    A progressive network (``grows``) and its discriminator take the keyword ``level``: the binary logarithm of the side
    of the images, fractional while a resolution fades in (``GrowConfig.level``). The default is full resolution.
    """

    grows = False
    truncates = False
    """Whether ``forward`` takes the keyword ``psi``, a scalar: the truncation of an intermediate latent."""
    num_styles = 1
    """Layers with a latent of their own. If there are several, z may also be ``[n, num_styles, z_dim]``."""
    takes_classes = False
    """Whether there is a conditional version of the network and of its discriminator."""
    embedding: nn.Embedding

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.z_dim = config.z_dim
        self.size = config.size
        self.classes = config.classes
        """Names of the classes by label; empty if the network is not conditional."""
        self.input_dim = config.z_dim
        """Length of ``conditioned``."""
        if config.classes:
            # Of length 1 (z has the square root of z_dim), as BigGAN's orthogonal initialisation makes it: with N(0, 1)
            # the class decides the image, and DCGAN's generator learns to ignore z.
            self.embedding = nn.Embedding(len(config.classes), config.z_dim)
            nn.init.normal_(self.embedding.weight, 0.0, config.z_dim**-0.5)
            self.input_dim += config.z_dim

    def conditioned(self, z: Tensor, label: Tensor | None) -> Tensor:
        """z, followed by the embedding of its class if there are classes: ``[n, input_dim]``."""
        assert (label is not None) == bool(self.classes), "a label for each latent, if there are classes"
        return z if label is None else torch.cat([z, self.embedding(label)], dim=1)

    def features(self, z: Tensor) -> Tensor:
        """What directions are found in: the activations of the first block, ``[n, channels, 4, 4]``, the map from which
        the image grows, or a mapping network's w, ``[n, z_dim]``. With classes it takes the keyword ``label`` too."""
        raise NotImplementedError

    def measure(self, batches: Iterable[Tensor], labels: Sequence[Tensor] = ()) -> None:
        """Measure what truncation needs on batches of latents ``[n, z_dim]`` and, if there are classes, their labels;
        nothing if there is no truncation."""


def widths_by_side(width: int, max_width: int, size: int) -> dict[int, int]:
    """Channels by side of the map, from 4 to the image's."""
    sides = [4 << i for i in range(size.bit_length() - 2)]
    return {side: min(width * (size // side), max_width) for side in sides}


def per_map(values: Tensor) -> Tensor:
    """``[n, c]`` -> ``[n, c, 1, 1]``, to multiply with feature maps."""
    return values.reshape(-1, values.shape[1], 1, 1)  # not [..., None, None]: OpenCV reads no such ONNX


class ClassProjection(nn.Module):
    """What the class adds to a logit: ``<v_y, features>`` with a learned vector for each class (Miyato and Koyama 2018,
    "cGANs with Projection Discriminator", eq. 4). Features ``[n, c]`` and labels int64 ``[n]`` -> ``[n]``.

    Args:
        deviation: standard deviation of the initial vectors.
        gain: factor of the result.
    """

    def __init__(self, num_classes: int, features: int, deviation: float, gain: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, features)
        nn.init.normal_(self.embedding.weight, 0.0, deviation)
        self.gain = gain

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        return (self.embedding(label) * features).sum(1) * self.gain


class Discriminator(nn.Module):
    """Images -> logits (the critic output for Wasserstein losses).

    ``forward`` takes all batches of a loss in one call: DistributedDataParallel expects one forward per backward
    (pytorch#175024), and one large batch of reals and fakes is faster than two small ones. ``BatchNorm`` computes their
    statistics separately. Where another layer mixes the samples of a batch (``mixes_samples``), reals and fakes go
    through the network one after the other inside the same call.
    """

    mixes_samples = False
    reconstructs = False
    """Whether ``forward`` takes the keyword ``quadrant`` and then also returns reconstruction errors, see
    ``FastGANDiscriminator``."""

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, size, size]`` -> logits ``[n]``. With classes it takes the keyword ``label`` too, int64
        ``[n]``."""
        raise NotImplementedError

    def forward(self, *batches: Tensor, label: Tensor | None = None, **growth: float) -> tuple[Tensor, ...]:
        """Logits of each batch, float32 ``[n]`` each; ``growth`` is the level of progressive networks.

        If there are classes, image *i* of every batch has the class ``label[i]``: fakes are made for the classes of the
        reals.

        The first two batches, reals and fakes, share a pass. Further ones share another, so that a penalty's double
        backward covers no other images.
        """
        passes = [[b] for b in batches] if self.mixes_samples else [p for p in (batches[:2], batches[2:]) if p]
        logits: list[Tensor] = []
        for together in passes:
            sizes = [len(batch) for batch in together]
            given: dict[str, Any] = {} if label is None else {"label": label.repeat(len(together))}
            with separate_statistics(self, sizes):
                values = self.logits(torch.cat(list(together)), **given, **growth).float()
            logits += values.split(sizes)
        return tuple(logits)


def minibatch_stddev(x: Tensor, over_ranks: bool) -> Tensor:
    """The standard deviation over the batch, averaged over features and pixels: a scalar (Karras et al. 2018,
    section 3).

    Over the whole minibatch as in the paper, not in groups; in training over all ranks, a collective, so that the value
    does not depend on the number of ranks.
    """
    x = x.float()
    sums = torch.cat([x.sum(0).flatten(), x.square().sum(0).flatten(), x.new_full((1,), len(x))])
    sums = differentiable_sum(sums) if over_ranks else sums
    mean, square = (sums[:-1] / sums[-1].detach()).chunk(2)
    return ((square - mean.square()).clamp(min=0) + 1e-8).sqrt().mean()
