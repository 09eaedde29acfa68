"""Exponential moving average of the generator's weights: the generator that is judged, kept and exported."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Average of ``module``'s parameters and float buffers with a half-life counted in images.

    The half-life ramps up with training, ``min(half_life, ramp * nimg)`` (Karras et al. 2020, StyleGAN2-ADA, appendix
    C), so that early averages are not dragged down by the initial weights. Every rank keeps the same average, since
    every rank holds the same weights.
    """

    def __init__(self, module: M, half_life: float, ramp: float) -> None:
        """``half_life`` in images; ``ramp`` as a share of the images seen so far."""
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life = half_life
        self.ramp = ramp

    @torch.no_grad()
    def update(self, module: M, batch: int, nimg: int) -> None:
        """Fold in the weights after an iteration of ``batch`` images that ended at ``nimg`` images."""
        half_life = min(self.half_life, self.ramp * nimg)
        weight = 1.0 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0
        torch._foreach_lerp_(_averaged(self.module), _averaged(module), weight)


def _averaged(module: nn.Module) -> list[Tensor]:
    """Parameters and floating-point buffers (batch norm's running statistics), in a fixed order."""
    return [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
