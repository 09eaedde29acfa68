"""Improved precision and recall: are the fakes like reals, and are all kinds of reals among the fakes?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the paper. Each side needs more features than that."""

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
    assert real.ndim == fake.ndim == 2, (real.shape, fake.shape)
    assert real.shape[1] == fake.shape[1], (real.shape, fake.shape)
    assert 1 <= k < min(len(real), len(fake)), (k, len(real), len(fake))
    precision = _share_inside(fake, real, _squared_radii(real, k, chunk), chunk)
    recall = _share_inside(real, fake, _squared_radii(fake, k, chunk), chunk)
    return precision, recall


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
    """The share of ``points [m, d]`` that lie in any of the balls around ``features [n, d]``, borders included."""
    inside = 0
    for _, rows in _chunks(points, chunk):
        covered = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for start, columns in _chunks(features, chunk):
            covered |= (_squared_distances(rows, columns) <= squared_radii[start : start + len(columns)]).any(1)
        inside += int(covered.sum().item())
    return inside / len(points)


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
