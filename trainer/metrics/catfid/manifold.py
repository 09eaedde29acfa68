"""Are the fakes like reals, are all kinds of reals among the fakes, and are fakes copies of reals?

Improved precision and recall, density and coverage, and authenticity: all by nearest neighbours in feature space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of precision and recall, as in the paper. Each side needs more features than that."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage, as in the paper."""

# A square this small against the squares it is the difference of is rounding, so the two features are the same.
_NOISE = 1e-13


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, chunk: int = 2048) -> tuple[float, float]:
    """Precision and recall of Kynkäänniemi et al., "Improved Precision and Recall Metric" (2019), eq. 1 and 2.

    A side's manifold is the union of balls around its features, each reaching to the feature's ``k``-th nearest
    neighbour on the same side (the feature itself does not count, an equal one does). Precision is the share of fakes
    on the reals' manifold, recall the share of reals on the fakes'. Both grow with fewer pictures: compare values of
    the same numbers only.

    Args:
        real, fake: features ``[n, d]`` on one device, more than ``k`` each.
        chunk: features of a side at a time; memory grows with its square, the result does not depend on it.
    """
    _check(real, fake)
    assert 1 <= k < min(len(real), len(fake)), (k, len(real), len(fake))
    precision = _share_inside(fake, real, _squared_radii(real, k, chunk), chunk)
    recall = _share_inside(real, fake, _squared_radii(fake, k, chunk), chunk)
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = DENSITY_NEIGHBOURS, chunk: int = 2048) -> tuple[float, float]:
    """Density and coverage of Naeem et al., "Reliable Fidelity and Diversity Metrics" (2020), eq. 4 and 5.

    Density counts in how many of the reals' balls a fake lies, in units of ``k``: 1 for fakes like reals, more where
    they crowd among the densest reals. Coverage is the share of reals with a fake in their ball, 0 to 1. Both use the
    reals' balls only, so outliers among the fakes do not help, as they do in recall.

    Args:
        real, fake: features ``[n, d]`` on one device; more than ``k`` reals.
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
    """The share of fakes that are no copies (Alaa et al., "How Faithful is your Synthetic Data?", 2022).

    A fake passes for a copy of its nearest real if it is no farther from it than that real's nearest other real. Of
    fakes that are drawn like the reals about half pass for copies by chance; much less than a half is memorisation.

    Args:
        real, fake: features ``[n, d]`` on one device; 2 reals or more, those that were trained on.
    """
    _check(real, fake)
    squares, which = nearest(fake, real, 1, chunk)
    return (squares[:, 0] > _squared_radii(real, 1, chunk)[which[:, 0]]).double().mean().item()


def nearest(points: Tensor, features: Tensor, k: int, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest ``features [n, d]`` of each of ``points [m, d]``: squared distances float64 and indices
    ``[m, k]``, the nearest first."""
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
    """Squared distance of each feature to its ``k``-th nearest among the others, float64 ``[n]``."""
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
    """The share of ``points [m, d]`` that lie in any of the balls around ``features [n, d]``."""
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for first, _, inside in _balls(points, features, squared_radii, chunk):
        covered[first : first + len(inside)] |= inside.any(1)
    return covered.double().mean().item()


def _balls(points: Tensor, features: Tensor, squared_radii: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Who of ``points`` lies in which of the balls around ``features``, borders included: blocks bool ``[m, n]``, each
    with the index of its first point and of its first ball."""
    for first, rows in _chunks(points, chunk):
        for start, columns in _chunks(features, chunk):
            yield first, start, _squared_distances(rows, columns) <= squared_radii[start : start + len(columns)]


def _chunks(features: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Position of the first, and up to ``chunk`` features, in float64: float32 loses small distances far from zero."""
    for first in range(0, len(features), chunk):
        yield first, features[first : first + chunk].double()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances float64 ``[m, n]`` of ``a [m, d]`` and ``b [n, d]``, exactly 0 between equal rows.

    As ``|a|^2 + |b|^2 - 2ab``, which is one matrix product. What rounding leaves of a difference of equal squares must
    not be taken for a distance: it could be negative, and would put equal features outside each other's balls.
    """
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)
    distances = torch.addmm(squares, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= _NOISE * squares, 0.0)
