"""Inception Score and share of cats for logits with known values."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.metrics.catfid.scores import cat_share, inception_score


def test_confident_and_varied_logits_score_the_number_of_classes():
    logits = 1000.0 * torch.eye(7).repeat(20, 1)
    assert inception_score(logits, splits=2) == pytest.approx((7.0, 0.0))


@pytest.mark.parametrize("logits", [torch.zeros(40, 5), torch.randn(1, 5).repeat(40, 1)])
def test_equal_logits_score_one(logits: torch.Tensor):
    assert inception_score(logits) == pytest.approx((1.0, 0.0))


def test_inception_score_by_hand():
    """Half of the logits are certain of class 0, half undecided: the marginal is 3/4, 1/4."""
    logits = torch.tensor([[1000.0, 0.0], [0.0, 0.0]] * 10)
    divergence = (math.log(4 / 3) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    mean, std = inception_score(logits, splits=1)
    assert mean == pytest.approx(math.exp(divergence))
    assert std == 0.0


def test_parts_are_consecutive():
    one, other = torch.zeros(30, 4), 1000.0 * torch.eye(4).repeat(8, 1)[:30]
    mean, std = inception_score(torch.cat([one, other]), splits=2)
    first, second = inception_score(one, 1)[0], inception_score(other, 1)[0]
    assert (mean, std) == pytest.approx(((first + second) / 2, abs(first - second) / 2))


def test_cat_share():
    probabilities = torch.full((4, 1000), 1e-6)
    probabilities[0, 281] = 0.9
    probabilities[1, [281, 282, 285]] = 0.2
    probabilities[2, [282, 283]] = 0.2
    probabilities[3, 207] = 0.9  # golden retriever
    assert cat_share(probabilities) == 0.5
