"""Exponential moving average (EMA) of the generator's weights: the generator that is evaluated, kept and exported."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from trainer.models.batchnorm import BatchNorm

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """EMA of ``module``'s parameters with a half-life counted in images.

    The half-life ramps up with training, ``min(half_life, ramp * nimg)`` (Karras et al. 2020, StyleGAN2-ADA, appendix
    C), so that the initial weights are forgotten early. Every rank keeps the same EMA, since every rank holds the same
    weights.

    With spectral norm the parameters are the weights before they are divided by their norm, and these are averaged. The
    norm is that of the average, see ``recompute_statistics``.
    """

    def __init__(self, module: M, half_life: float, ramp: float) -> None:
        """``half_life`` in images; ``ramp`` as a share of the images seen so far."""
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life = half_life
        self.ramp = ramp

    @torch.no_grad()
    def update(self, module: M, batch: int, nimg: int) -> None:
        """Update after an iteration of ``batch`` images that ended at ``nimg`` images."""
        half_life = min(self.half_life, self.ramp * nimg)
        weight = 1.0 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[Tensor], labels: Sequence[Tensor] = (), **growth: float) -> None:
        """Recompute what belongs to the EMA weights: the norms of spectral norm, and the batch-norm statistics on
        latents ``[n, z_dim]`` and, if there are classes, their labels ``[n]``.

        An EMA of the statistics would not fit the EMA of the weights; recomputed ones are BigGAN's standing statistics
        (Brock et al. 2019, appendix B). A variance is the mean of those within the batches plus the variance of the
        batches' means, so that small batches do not make it smaller. The statistics depend on weights and latents only,
        not on what was computed before. Not a collective. A no-op without spectral norm and batch norm.
        """
        _recompute_spectral_norms(self.module)
        norms = [m for m in self.module.modules() if isinstance(m, nn.BatchNorm2d)]
        if not norms:
            return
        spanning = [norm for norm in norms if isinstance(norm, BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = 1.0  # the statistics of the last batch
        for norm in spanning:
            norm.over_ranks = False
        buffers = [_statistics(norm) for norm in norms]
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in norms]
        for i, z in enumerate(batches):
            label: dict[str, Any] = {"label": labels[i]} if labels else {}
            self.module(z, **label, **growth)
            for (mean, variance), found in zip(buffers, seen, strict=True):
                found.append((mean.clone(), variance.clone()))
        for (mean, variance), found in zip(buffers, seen, strict=True):
            means, variances = map(torch.stack, zip(*found, strict=True))
            mean.copy_(means.mean(0))
            variance.copy_(variances.mean(0) + means.var(0, correction=0))
        for norm in norms:
            norm.eval()
        for norm in spanning:
            norm.over_ranks = True


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _recompute_spectral_norms(module: nn.Module) -> None:
    """Set the vectors u and v of each spectral norm to the first singular vectors of its weight W, so that the norm by
    which evaluation mode divides, u'Wv, is the largest singular value.

    In training they follow the weights by one step of the power iteration in each forward. The EMA's own do not move,
    since it is in evaluation mode, and training's are those of other weights: with either u'Wv would be below the norm
    of the average, and the layer's above 1. They come from an exact decomposition, not from further steps, whose result
    would depend on the vectors before and so on where a training was interrupted.
    """
    lists = [part for part in module.modules() if isinstance(part, ParametrizationList)]
    for weights in lists:
        for norm in weights:
            if isinstance(norm, _SpectralNorm):
                w = norm._reshape_weight_to_matrix(weights.original).double()
                is_tall = w.shape[0] > w.shape[1]
                w = w.T if is_tall else w  # the smaller one of WW' and W'W
                first = torch.linalg.eigh(w @ w.T).eigenvectors[:, -1]
                other = F.normalize(w.T @ first, dim=0)
                norm._u.copy_(other if is_tall else first)
                norm._v.copy_(first if is_tall else other)
