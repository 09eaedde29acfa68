"""How much of a distance is chance: standard errors from the features that the distance was computed of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.metrics.frechet import Gaussian, Moments, frechet_distance
from trainer.metrics.kernel import NUM_SUBSETS, cubic_kernel

GROUPS = 10

# Student's t, 97.5 %, for the 9 degrees of freedom of ten groups. A little wide for the kernel distance.
_T = 2.262

_ROWS = 1024


def frechet_error(real: Gaussian, fake: Tensor) -> float:
    """Standard error of ``frechet_distance`` from drawing the fakes ``[n, d]``; the reals are taken as given.

    A jackknife over ten random groups, each left out once (Efron and Stein, "The Jackknife Estimate of Variance",
    1981): it errs on the wide side for any statistic. A bootstrap would draw pictures twice, which lowers the rank of
    the covariance and moves the whole distribution of distances upwards; linear approximations of the distance fail
    where there are hardly more pictures than dimensions. Here each part has 9 tenths of the pictures and so almost the
    same bias, which cancels in the differences. Takes ten eigen-decompositions.

    What is estimated is the spread of the distance of ``n`` fakes about its mean for ``n`` fakes: the bias that the
    name's number stands for (``fid2k``) remains in both.
    """
    assert len(fake) >= 2 * GROUPS, len(fake)
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0)).to(fake.device)
    everything = Moments(real.dim, fake.device)
    for rows in fake.split(_ROWS):
        everything.update(rows)
    values = [frechet_distance(real, everything.without(fake[order[i::GROUPS]]).gaussian()) for i in range(GROUPS)]
    return math.sqrt((GROUPS - 1) * np.var(values))


def kernel_error(real: Tensor, fake: Tensor, subset_std: float) -> float:
    """Standard error of ``kernel_distance`` from drawing the fakes ``[n, d]``; the reals ``[m, d]`` are taken as given.

    A jackknife that leaves out one fake at a time, of the estimate over all pairs, which the mean over subsets stands
    for; sums of the kernel's rows give every value at once. ``subset_std``, the standard deviation over these subsets,
    adds what drawing them adds to the mean: they are independent, given the features.
    """
    n, m = len(fake), len(real)
    assert n >= 3, n
    assert m >= 1, m
    within, between = (torch.cat([_row_sums(rows, side) for rows in fake.split(_ROWS)]) for side in (fake, real))
    rows = fake.double()
    within = within - cubic_kernel((rows * rows).sum(1), rows.shape[1])
    left = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (between.sum() - between) / (m * (n - 1))
    return math.sqrt((n - 1) * left.var(correction=0).item() + subset_std**2 / NUM_SUBSETS)


def _row_sums(rows: Tensor, side: Tensor) -> Tensor:
    """Of the kernel's values of ``rows [r, d]`` with all of ``side [n, d]``: float64 ``[r]``."""
    sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for part in side.split(_ROWS):
        sums += cubic_kernel(rows.double() @ part.double().T, rows.shape[1]).sum(1)
    return sums


def interval(value: float, error: float) -> tuple[float, float]:
    """The 95 % interval about ``value``, by Student's t."""
    return value - _T * error, value + _T * error


@dataclass(frozen=True)
class Comparison:
    """Whether one of two generators is better, judged by the same reals."""

    difference: float
    """First minus second: below 0 where the first is better."""
    interval: tuple[float, float]
    """95 % of the difference."""

    @property
    def more_than_noise(self) -> bool:
        return not self.interval[0] <= 0.0 <= self.interval[1]


def compare(value: float, error: float, other: float, other_error: float) -> Comparison:
    """Compare two distances of one name, lower is better, by their standard errors.

    Both are measured against the same reals, so the reals' chance is no part of the difference. The fakes of the two
    are taken as independent: generators that answer to the same seeds alike differ by less, so the interval is on the
    wide side.
    """
    difference = value - other
    return Comparison(difference, interval(difference, math.hypot(error, other_error)))
