"""Metrics of nearest neighbours on sets with known values, against loops over the definition, and against prdc."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
import torch

from trainer.metrics.catfid.manifold import authenticity, density_coverage, nearest, precision_recall


def features(num: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def naive(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [
            sorted(np.linalg.norm(a - b) for j, b in enumerate(manifold) if j != i)[k - 1]
            for i, a in enumerate(manifold)
        ]
        inside = [any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(fake, real), share(real, fake)


def test_a_set_against_itself_has_full_precision_and_recall():
    x = features(300, 16, 0)
    assert precision_recall(x, x) == (1.0, 1.0)


def test_distant_clusters_have_neither_precision_nor_recall():
    assert precision_recall(features(200, 8, 0), features(150, 8, 1, shift=100.0)) == (0.0, 0.0)


def test_one_of_two_modes_has_full_precision_and_half_recall():
    modes = [features(400, 4, seed, shift) for seed, shift in ((0, -50.0), (1, 50.0))]
    both, one = torch.cat(modes), features(800, 4, 2, 50.0)
    precision, recall = precision_recall(both, one)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    assert precision_recall(one, both) == (recall, precision)


def test_precision_and_recall_by_hand():
    """k = 1: reals 0, 1, 3 have radii 1, 1, 2, covering -1 to 5; fakes 5, 5.5, 9 have 0.5, 0.5, 3.5, covering 4.5 to
    12.5."""
    real, fake = (torch.tensor(values)[:, None] for values in ([0.0, 1.0, 3.0], [5.0, 5.5, 9.0]))
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(1 / 3), "5 is on the border of the ball around 3"
    assert recall == 0.0
    assert precision_recall(real, torch.tensor([[0.5], [2.0], [9.0], [5.001]]), k=1)[0] == 0.5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_by_definition(k: int):
    real, fake = features(60, 5, 0), features(45, 5, 1, shift=1.0, scale=0.8)
    expected = naive(real.double().numpy(), fake.double().numpy(), k)
    assert 0 < min(expected) < max(expected) < 1
    assert precision_recall(real, fake, k) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_precision_and_recall_do_not_depend_on_the_chunk(chunk: int):
    real, fake = features(130, 6, 0), features(97, 6, 1, shift=0.7)
    assert precision_recall(real, fake, chunk=chunk) == precision_recall(real, fake)


def test_equal_features_far_from_zero_are_equal():
    """The balls of a collapsed generator have radius 0 and contain equal reals only."""
    spot = features(1, 64, 0) + 1000.0
    collapsed = spot.repeat(10, 1)
    assert precision_recall(collapsed, collapsed.clone()) == (1.0, 1.0)
    reals = torch.cat([collapsed[:5], spot + features(5, 64, 1, scale=1e-2)])
    precision, recall = precision_recall(reals, collapsed)
    assert (precision, recall) == (1.0, 0.5)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_four_metrics_equal_those_of_prdc(k: int):
    real, fake = features(300, 8, 0), features(250, 8, 1, shift=0.4, scale=0.9)
    expected = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert precision_recall(real, fake, k) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)
    assert density_coverage(real, fake, k) == pytest.approx((expected["density"], expected["coverage"]), abs=1e-12)
    assert 0 < expected["coverage"] < 1


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_other_metrics_do_not_depend_on_the_chunk(chunk: int):
    real, fake = features(130, 6, 0), features(97, 6, 1, shift=0.7)
    assert density_coverage(real, fake, chunk=chunk) == density_coverage(real, fake)
    assert authenticity(real, fake, chunk=chunk) == authenticity(real, fake)
    squares, which = nearest(fake, real, 4, chunk)
    expected_squares, expected = nearest(fake, real, 4)
    assert torch.equal(which, expected)
    torch.testing.assert_close(squares, expected_squares)


def test_density_and_coverage_by_hand():
    """k = 1: reals 0, 1, 3 have radii 1, 1, 2. The balls of 0 and 1 contain fakes 0.5 and 0.6, that of 3 fake 5."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [0.6], [5.0], [9.0]])
    assert density_coverage(real, fake, k=1) == (5 / 4, 1.0)
    assert density_coverage(real, fake[:2], k=1) == (2.0, 2 / 3)


def test_copies_are_not_authentic():
    real = features(400, 8, 0)
    assert authenticity(real[[0, 0, 1]], real[:1]) == 0.0, "a copy of an image that occurs twice"
    assert authenticity(real, real + features(400, 8, 1, scale=1e-3)) == 0.0
    assert authenticity(real, features(400, 8, 2, shift=100.0)) == 1.0
    assert 0.4 < authenticity(real, features(400, 8, 3)) < 0.9


def test_nearest_gives_neighbours_in_order():
    squares, which = nearest(torch.tensor([[0.0], [10.0]]), torch.tensor([[4.0], [1.0], [9.0]]), 2)
    assert which.tolist() == [[1, 0], [2, 0]]
    assert squares.tolist() == [[1.0, 16.0], [1.0, 36.0]]
