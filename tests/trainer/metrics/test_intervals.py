"""Standard errors against the spread of many samples from known Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.metrics.frechet import Gaussian, Moments, frechet_distance
from trainer.metrics.intervals import compare, frechet_error, interval, kernel_error
from trainer.metrics.kernel import kernel_distance

NUM_SAMPLES = 100


def samples(num: int, dim: int, shift: float, scale: float, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num, dim, generator=generator) * scale + shift for _ in range(NUM_SAMPLES)]


def distance(real: Gaussian, fake: torch.Tensor) -> float:
    moments = Moments(real.dim)
    moments.update(fake)
    return frechet_distance(real, moments.gaussian())


@pytest.mark.parametrize(("num", "dim"), [(200, 4), (40, 24), (24, 32)])
def test_the_interval_of_a_frechet_distance_covers_its_mean(num: int, dim: int):
    """With many more images than dimensions, hardly more, and fewer, where the covariance is singular."""
    real = Gaussian(np.zeros(dim), np.eye(dim), 10**6)
    fakes = samples(num, dim, shift=0.5, scale=1.3)
    values = np.array([distance(real, fake) for fake in fakes])
    errors = np.array([frechet_error(real, fake) for fake in fakes])
    intervals = [interval(value, error) for value, error in zip(values, errors, strict=True)]
    covered = np.mean([low <= values.mean() <= high for low, high in intervals])
    assert covered >= 0.9
    assert 0.85 < np.sqrt((errors**2).mean()) / values.std() < 1.4


@pytest.mark.parametrize(("num", "dim"), [(203, 4), (24, 32)])
def test_the_error_of_a_frechet_distance_is_the_jackknife(num: int, dim: int):
    """The same as from ten distances, each without a tenth of the images."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(300, dim, dtype=torch.float64, generator=generator) @ torch.randn(dim, dim).double()
    moments = Moments(dim)
    moments.update(mixed + 2)
    real = moments.gaussian()
    fake = torch.randn(num, dim, generator=generator) * 1.3 + 1
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    left = [torch.ones(num, dtype=torch.bool).index_fill(0, order[i::10], False) for i in range(10)]
    values = [distance(real, fake[kept]) for kept in left]
    assert frechet_error(real, fake) == pytest.approx(np.sqrt(9 * np.var(values)), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_interval_of_a_kernel_distance_covers_its_mean(shift: float):
    """Without a shift the estimate is degenerate: its variance comes from pairs, not from single images."""
    real = torch.randn(300, 5, generator=torch.Generator().manual_seed(9))
    fakes = samples(100, 5, shift, scale=1.0)
    full = np.array([_over_all_pairs(real, fake) for fake in fakes])
    errors = np.array([kernel_error(real, fake, 0.0) for fake in fakes])
    covered = np.mean(np.abs(full - full.mean()) <= [interval(0, error)[1] for error in errors])
    assert covered >= 0.9
    assert 0.85 < np.sqrt((errors**2).mean()) / full.std() < 1.6


def test_the_error_of_a_kernel_distance_includes_the_choice_of_subsets():
    """The spread over different subsets of the same features is what they add to the error."""
    generator = torch.Generator().manual_seed(3)
    real, fake = (torch.randn(1500, 4, generator=generator) for _ in range(2))
    found = [kernel_distance(real, fake, seed) for seed in range(24)]
    values, stds = np.array(found).T
    added = np.sqrt(kernel_error(real, fake, stds[0]) ** 2 - kernel_error(real, fake, 0.0) ** 2)
    assert 0.7 < added / values.std() < 1.4


def _over_all_pairs(real: torch.Tensor, fake: torch.Tensor) -> float:
    x, y = real.double(), fake.double()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return (sum(within) - 2 * xy.mean()).item()


def test_the_error_of_a_kernel_distance_is_the_jackknife():
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(11, 3, generator=generator), torch.randn(9, 3, generator=generator) + 1
    left = [_over_all_pairs(real, torch.cat([fake[:i], fake[i + 1 :]])) for i in range(9)]
    assert kernel_error(real, fake, 0.0) == pytest.approx(np.sqrt(8 * np.var(left)), rel=1e-9)
    assert kernel_distance(real, torch.cat([fake, fake[:2]]))[0] == pytest.approx(
        _over_all_pairs(real, torch.cat([fake, fake[:2]])), rel=1e-9
    )


def test_only_a_difference_in_quality_is_more_than_noise():
    real = Gaussian(np.zeros(6), np.eye(6), 10**6)

    def evaluated(fakes: list[torch.Tensor]) -> list[tuple[float, float]]:
        return [(distance(real, fake), frechet_error(real, fake)) for fake in fakes]

    good, alike, worse = (evaluated(samples(100, 6, s, 1.0, seed)) for s, seed in ((0.2, 1), (0.2, 2), (0.5, 3)))
    false = [compare(*a, *b).more_than_noise for a, b in zip(good, alike, strict=True)]
    true = [compare(*a, *b) for a, b in zip(good, worse, strict=True)]
    assert np.mean(false) <= 0.08
    assert np.mean([c.more_than_noise and c.difference < 0 for c in true]) > 0.95
