"""The kernel distance: the squared maximum mean discrepancy of features, unbiased for any number of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

NUM_SUBSETS = 100
SUBSET_SIZE = 1000

# Up to this many features per side all kernel values are computed once and only summed per subset, which at 2,048 saves
# 19 of 20 multiplications. With more features, computing each subset by itself is less work and needs less memory.
_ALL_AT_ONCE = 5 * SUBSET_SIZE


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (Bińkowski et al., "Demystifying MMD GANs", 2018): mean and standard deviation over random subsets.

    Each of 100 subsets has the same number of features of both sides, drawn without replacement: 1,000, or as many as
    the smaller side has. The estimate is unbiased, so it may be slightly negative for equal distributions.

    Args:
        real, fake: features ``[n, d]``, at least 2 each.
        seed: for drawing the subsets.
    """
    size = min(SUBSET_SIZE, len(real), len(fake))
    assert size >= 2, size
    rng = np.random.Generator(np.random.PCG64(seed))
    at_once = NUM_SUBSETS if max(len(real), len(fake)) <= _ALL_AT_ONCE else 1
    values = []
    for _ in range(NUM_SUBSETS // at_once):
        picks = [[rng.choice(len(side), size, replace=False) for side in (real, fake)] for _ in range(at_once)]
        in_real, in_fake = zip(*picks, strict=True)
        values.append(_mmd2(*_members(real, in_real), *_members(fake, in_fake)))
    estimates = torch.cat(values)
    return estimates.mean().item(), estimates.std(correction=0).item()


def cubic_kernel(dots: Tensor, dim: int) -> Tensor:
    """``(x y / d + 1)^3`` for dot products ``x y`` (Bińkowski et al., 2018, section 4)."""
    return (dots / dim + 1) ** 3


def _members(features: Tensor, picks: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The features float64 ``[m, d]`` that are in any subset, and their membership: zeros and ones ``[m, subsets]``."""
    rows, positions = np.unique(np.stack(picks), return_inverse=True)
    inside = torch.zeros(len(rows), len(picks), dtype=torch.float64)
    inside.scatter_(0, torch.from_numpy(positions.reshape(len(picks), -1).T.copy()), 1.0)
    return features[torch.from_numpy(rows).to(features.device)].double(), inside.to(features.device)


def _mmd2(x: Tensor, in_x: Tensor, y: Tensor, in_y: Tensor) -> Tensor:
    """Unbiased estimates of the squared MMD (Gretton et al., 2012, eq. 3) for each subset: float64 ``[subsets]``."""
    m = in_x[:, 0].sum()
    kernel = partial(cubic_kernel, dim=x.shape[1])

    def mean_within(a: Tensor, inside: Tensor) -> Tensor:
        pairs = (inside * (kernel(a @ a.T) @ inside)).sum(0) - kernel((a * a).sum(1)) @ inside
        return pairs / (m * (m - 1))

    between = (in_x * (kernel(x @ y.T) @ in_y)).sum(0) / m**2
    return mean_within(x, in_x) + mean_within(y, in_y) - 2 * between
