"""What a classifier says of the pictures, on logits whose scores are known."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.metrics.catfid.scores import cat_share, inception_score


def test_sure_and_varied_pictures_score_the_number_of_classes():
    logits = 1000.0 * torch.eye(7).repeat(20, 1)
    assert inception_score(logits, splits=2) == pytest.approx((7.0, 0.0))


@pytest.mark.parametrize("logits", [torch.zeros(40, 5), torch.randn(1, 5).repeat(40, 1)])
def test_pictures_that_all_say_the_same_score_one(logits: torch.Tensor):
    assert inception_score(logits) == pytest.approx((1.0, 0.0))


def test_the_definition_by_hand():
    """Half of the pictures are of class 0 for sure, half undecided: the marginal is 3/4, 1/4."""
    logits = torch.tensor([[1000.0, 0.0], [0.0, 0.0]] * 10)
    divergence = (math.log(4 / 3) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    mean, std = inception_score(logits, splits=1)
    assert mean == pytest.approx(math.exp(divergence))
    assert std == 0.0


def test_parts_are_taken_in_order():
    one, other = torch.zeros(30, 4), 1000.0 * torch.eye(4).repeat(8, 1)[:30]
    mean, std = inception_score(torch.cat([one, other]), splits=2)
    first, second = inception_score(one, 1)[0], inception_score(other, 1)[0]
    assert (mean, std) == pytest.approx(((first + second) / 2, abs(first - second) / 2))


def test_shares_of_cats():
    probabilities = torch.full((4, 1000), 1e-6)
    probabilities[0, 281] = 0.9
    probabilities[1, [281, 282, 285]] = 0.2
    probabilities[2, [282, 283]] = 0.2
    probabilities[3, 207] = 0.9  # golden retriever
    assert cat_share(probabilities) == 0.5
