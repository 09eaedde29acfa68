"""Scores of what a classifier says of the pictures: the Inception Score, and whether they are cats at all."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = 10

CATS = slice(281, 286)
"""ImageNet's classes of domestic cats: tabby, tiger cat, Persian, Siamese, Egyptian."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """The Inception Score (Salimans et al., "Improved Techniques for Training GANs", 2016): mean and standard deviation
    over ``splits`` equal parts, in the given order.

    ``exp(E KL(p(y|x) || p(y)))``, from 1 to the number of classes: high where each picture is of one class and all
    classes occur. It never looks at real pictures, and of faces of cats, which are few of the classes, it says little.

    Args:
        logits: ``[n, classes]``, at least one a part.
    """
    assert len(logits) >= splits >= 1, (len(logits), splits)
    log_p = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[len(log_p) * i // splits : len(log_p) * (i + 1) // splits]
        marginal = part.logsumexp(0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


def cat_share(probabilities: Tensor) -> float:
    """The share of pictures, 0 to 1, of which ImageNet's classes say domestic cat with at least a half.

    Args:
        probabilities: of ImageNet's classes, ``[n, 1000]``.
    """
    return (probabilities[:, CATS].sum(1) >= 0.5).double().mean().item()
