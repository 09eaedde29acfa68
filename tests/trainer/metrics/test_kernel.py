"""Kernel distances against loops over the definition, and their unbiasedness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.metrics import kernel
from trainer.metrics.kernel import kernel_distance


def features(num: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def naive_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k(a, b) for a in x for b in y) / (m * n)
    return xx + yy - 2 * xy


def test_small_sets_give_the_definition_in_every_subset():
    x, y = features(25, 6, 0), features(25, 6, 1, 0.3)
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(naive_mmd2(x.double().numpy(), y.double().numpy()), rel=1e-9)
    assert std == pytest.approx(0, abs=1e-12)


def test_the_mean_over_subsets_estimates_that_over_all_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 20)
    monkeypatch.setattr(kernel, "NUM_SUBSETS", 3000)
    x, y = features(40, 6, 0), features(60, 6, 1, 0.5)
    mean, std = kernel_distance(x, y)
    assert std > 0
    assert abs(mean - naive_mmd2(x.double().numpy(), y.double().numpy())) < 4 * std / 3000**0.5


def test_both_ways_of_computing_subsets_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 30)
    x, y = features(70, 16, 0), features(90, 16, 1, 0.2)
    at_once = kernel_distance(x, y, seed=3)
    monkeypatch.setattr(kernel, "_ALL_AT_ONCE", 0)
    assert kernel_distance(x, y, seed=3) == pytest.approx(at_once, rel=1e-9)


def test_equal_distributions_give_zero_on_average():
    same = [kernel_distance(features(60, 32, s), features(60, 32, 100 + s))[0] for s in range(40)]
    spread = np.std(same)
    assert abs(np.mean(same)) < 4 * spread / 40**0.5
    assert min(same) < 0 < max(same)
    assert kernel_distance(features(60, 32, 0), features(60, 32, 1, 0.5))[0] > 10 * spread


def test_the_seed_chooses_the_subsets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 10)
    x, y = features(50, 8, 0), features(50, 8, 1)
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)
