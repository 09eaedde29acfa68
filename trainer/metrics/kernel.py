"""Kernel distance: the squared maximum mean discrepancy of features, which is unbiased for any number of pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (Bińkowski et al., "Demystifying MMD GANs", 2018): mean and standard deviation over random subsets.

    Each of 100 subsets takes the same number of features from both sides without putting back: 1,000, or all of the
    smaller side. The unbiased estimate may be slightly negative where the distributions agree.

    Args:
        real, fake: features ``[n, d]``, at least 2 each.
        seed: of the subsets.
    """
    size = min(SUBSET_SIZE, len(real), len(fake))
    assert size >= 2, size
    rng = np.random.Generator(np.random.PCG64(seed))

    def subset(features: Tensor) -> Tensor:
        chosen = torch.from_numpy(rng.choice(len(features), size, replace=False))
        return features[chosen.to(features.device)].double()

    values = [_mmd2(subset(real), subset(fake)) for _ in range(NUM_SUBSETS)]
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared MMD (Gretton et al., 2012, eq. 3) of ``[m, d]`` and ``[m, d]``."""
    m = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (m * (m - 1))

    within = mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y))
    return (within - 2 * kernel(x, y).mean()).item()
