"""Scores from a classifier's output: the Inception Score, and the share of images that are cats."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = 10

CATS = slice(281, 286)
"""ImageNet's classes of domestic cats: tabby, tiger cat, Persian, Siamese, Egyptian."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """The Inception Score (Salimans et al., "Improved Techniques for Training GANs", 2016): mean and standard deviation
    over ``splits`` consecutive parts of equal size.

    ``exp(E KL(p(y|x) || p(y)))``, from 1 to the number of classes: high if each image clearly belongs to one class and
    all classes occur. It ignores the real images and means little for cat faces, which are few of ImageNet's classes.

    Args:
        logits: ``[n, classes]``, n >= ``splits``.
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
    """The share of images, 0 to 1, that are a domestic cat with a probability of at least 0.5.

    Args:
        probabilities: of ImageNet's classes, ``[n, 1000]``.
    """
    return (probabilities[:, CATS].sum(1) >= 0.5).double().mean().item()
