"""Fidelity, coverage and memorisation from nearest neighbours in feature space.

Improved precision and recall, density and coverage, and authenticity.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of precision and recall, as in the paper."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage, as in the paper."""

# A squared distance this small relative to the features' squared norms is rounding error: the features are equal.
_NOISE = 1e-13


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, chunk: int = 2048) -> tuple[float, float]:
    """Precision and recall of Kynkäänniemi et al., "Improved Precision and Recall Metric" (2019), eq. 1 and 2.

    The manifold of a side is the union of balls around its features, with the distance to the feature's ``k``-th
    nearest neighbour on the same side as radius (the feature itself does not count, an equal one does). Precision is
    the share of generated images in the manifold of the real ones, recall the share of real images in that of the
    generated ones. Both rise when there are fewer images: compare values of equal numbers only.

    Args:
        real, fake: features ``[n, d]`` on one device, more than ``k`` each.
        chunk: features of a side per block; memory grows with its square, the result does not depend on it.
    """
    _check(real, fake)
    assert 1 <= k < min(len(real), len(fake)), (k, len(real), len(fake))
    precision = _share_inside(fake, real, _squared_radii(real, k, chunk), chunk)
    recall = _share_inside(real, fake, _squared_radii(fake, k, chunk), chunk)
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = DENSITY_NEIGHBOURS, chunk: int = 2048) -> tuple[float, float]:
    """Density and coverage of Naeem et al., "Reliable Fidelity and Diversity Metrics" (2020), eq. 4 and 5.

    Density is the mean number of real images' balls that contain a generated image, divided by ``k``: 1 for the real
    distribution, more where generated images concentrate in its dense regions. Coverage is the share of real images
    with a generated image in their ball, 0 to 1. Only the balls of real images count, so outliers among the generated
    images do not raise the value, as they do for recall.

    Args:
        real, fake: features ``[n, d]`` on one device; more than ``k`` real ones.
        chunk: see ``precision_recall``.
    """
    _check(real, fake)
    assert 1 <= k < len(real), (k, len(real))
    radii = _squared_radii(real, k, chunk)
    total = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, start, inside in _balls(fake, real, radii, chunk):
        total += int(inside.sum().item())
        covered[start : start + inside.shape[1]] |= inside.any(0)
    return total / (k * len(fake)), covered.double().mean().item()


def authenticity(real: Tensor, fake: Tensor, chunk: int = 2048) -> float:
    """The share of generated images that are not copies (Alaa et al., "How Faithful is your Synthetic Data?", 2022).

    A generated image counts as a copy of the nearest real image if it is at most as far away as that one's nearest real
    neighbour. For new samples of the real distribution about half count as copies by chance; a value far below 0.5
    indicates memorisation.

    Args:
        real, fake: features ``[n, d]`` on one device; ``real`` are 2 or more images of the training data.
    """
    _check(real, fake)
    squares, which = nearest(fake, real, 1, chunk)
    return (squares[:, 0] > _squared_radii(real, 1, chunk)[which[:, 0]]).double().mean().item()


def nearest(points: Tensor, features: Tensor, k: int, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest ``features [n, d]`` of each of ``points [m, d]``, the nearest first: squared distances float64
    and indices int64, both ``[m, k]``."""
    _check(points, features)
    assert 1 <= k <= len(features), (k, len(features))
    found: list[tuple[Tensor, Tensor]] = []
    for _, rows in _chunks(points, chunk):
        squares = torch.empty(len(rows), 0, dtype=torch.float64, device=rows.device)
        which = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for start, columns in _chunks(features, chunk):
            here = torch.arange(start, start + len(columns), device=rows.device).expand(len(rows), -1)
            squares = torch.cat([squares, _squared_distances(rows, columns)], 1)
            squares, picked = squares.topk(min(k, squares.shape[1]), 1, largest=False)
            which = torch.cat([which, here], 1).gather(1, picked)
        found.append((squares, which))
    return torch.cat([squares for squares, _ in found]), torch.cat([which for _, which in found])


def _check(a: Tensor, b: Tensor) -> None:
    assert a.ndim == b.ndim == 2, (a.shape, b.shape)
    assert a.shape[1] == b.shape[1], (a.shape, b.shape)


def _squared_radii(features: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each feature to its ``k``-th nearest neighbour, float64 ``[n]``."""
    radii = []
    for first, rows in _chunks(features, chunk):
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=rows.device)
        for start, columns in _chunks(features, chunk):
            squares = _squared_distances(rows, columns)
            if start == first:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], 1).topk(k, 1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _share_inside(points: Tensor, features: Tensor, squared_radii: Tensor, chunk: int) -> float:
    """The share of ``points [m, d]`` inside any of the balls around ``features [n, d]``."""
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for first, _, inside in _balls(points, features, squared_radii, chunk):
        covered[first : first + len(inside)] |= inside.any(1)
    return covered.double().mean().item()


def _balls(points: Tensor, features: Tensor, squared_radii: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Which of ``points`` are inside which of the closed balls around ``features``: indices of a block's first point
    and first ball, and the block, bool ``[m, n]``."""
    for first, rows in _chunks(points, chunk):
        for start, columns in _chunks(features, chunk):
            yield first, start, _squared_distances(rows, columns) <= squared_radii[start : start + len(columns)]


def _chunks(features: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Index of the first, and up to ``chunk`` features in float64: float32 loses small distances far from zero."""
    for first in range(0, len(features), chunk):
        yield first, features[first : first + chunk].double()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances float64 ``[m, n]`` of ``a [m, d]`` and ``b [n, d]``, exactly 0 between equal rows.

    Computed as ``|a|^2 + |b|^2 - 2ab``, one matrix product. Rounding errors between equal rows are set to 0, because
    they could be negative or put equal features outside each other's balls.
    """
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)
    distances = torch.addmm(squares, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= _NOISE * squares, 0.0)
