"""Adversarial losses and gradient penalties, one value per sample, so that a mean over any split
of the batch (micro-batches, ranks) adds up to the mean over the whole batch.

A *critic value* is the discriminator's raw output, float ``[n]``: high means "real".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Loss:
    """A pair of losses. ``discriminator(real, fake)`` and ``generator(real, fake)`` map critic values ``[n]`` to
    losses ``[n]``; where ``paired`` is false the generator's loss ignores ``real`` (pass an empty tensor)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    paired: bool


LOSSES = {
    # Goodfellow et al. 2014, eq. 1 with the non-saturating generator loss of section 3; this is DCGAN's BCE,
    # since -log sigmoid(x) = softplus(-x).
    "bce": Loss(
        discriminator=lambda real, fake: softplus(-real) + softplus(fake),
        generator=lambda real, fake: softplus(-fake),
        paired=False,
    ),
    # Relativistic paired loss: Jolicoeur-Martineau 2019; with R1 and R2 it is R3GAN (Huang et al. 2024, eq. 2 and 5).
    "rpgan": Loss(
        discriminator=lambda real, fake: softplus(fake - real),
        generator=lambda real, fake: softplus(real - fake),
        paired=True,
    ),
}


def zero_centred_penalty(images: Sequence[Tensor], critic: Tensor) -> Tensor:
    """``sum_k |d critic_k / d images_k|^2`` for each of the given image batches, summed over the batches: ``[n]``.

    With the reals alone it is R1, with the fakes alone R2 (Mescheder et al. 2018, eq. 9 and 10). The gradient is
    taken with respect to the images only and keeps its graph, so that one ``backward()`` of the whole loss reaches
    the parameters and DistributedDataParallel's hooks fire once (pytorch#47562, pytorch#63929).

    Args:
        images: batches ``[n, c, h, w]`` that require grad; all of the same ``n``.
        critic: critic values of all of them, any shape; each value depends on one image only.
    """
    gradients = torch.autograd.grad(critic.sum(), list(images), create_graph=True)
    return torch.stack([g.float().square().sum(dim=(1, 2, 3)) for g in gradients]).sum(dim=0)
