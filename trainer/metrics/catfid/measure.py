"""From the images of a side to their features and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from catgan.command import say
from trainer.features.extractors import Extractor
from trainer.metrics.catfid.neighbours import NUM_ROWS
from trainer.metrics.catfid.sides import Side
from trainer.metrics.evaluate import load_statistics, save_statistics, statistics_path
from trainer.metrics.frechet import Gaussian, Moments

_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Networks:
    """The networks that images pass through."""

    extractor: Extractor
    classify: Callable[[Tensor], Tensor] | None = None
    """Images to the probabilities of ImageNet's classes ``[n, 1000]``; None if no metric needs these."""


@dataclass(frozen=True)
class Measured:
    """Statistics of a side's features. The rest is empty unless it was asked for."""

    gaussian: Gaussian
    features: Tensor = _EMPTY
    """``[n, dim]``"""
    probabilities: Tensor = _EMPTY
    """Of ImageNet's classes, ``[n, 1000]``."""
    first_images: Tensor = _EMPTY
    """At most 16, uint8 ``[n, 3, H, W]``."""


def measure(side: Side, label: str, networks: Networks, keep_features: bool) -> Measured:
    """Read or generate each image of ``side`` once and compute its features.

    If only statistics are needed and those of a data set are cached, no image is read.

    Args:
        label: the side's name for messages.
        keep_features: whether all features are needed, not only their statistics.
    """
    extractor = networks.extractor
    if isinstance(side, Gaussian):
        return Measured(side)
    cached = statistics_path(*side.shards, extractor) if side.shards and not keep_features else None
    if cached and (known := load_statistics(cached)):
        say(f"{label}: statistics of {side.count:,} images from {cached}")
        return Measured(known)
    first_images, probabilities = _EMPTY, []
    features = torch.empty(side.count if keep_features else 0, extractor.dim, device=extractor.device)
    moments = Moments(extractor.dim, extractor.device)
    with tqdm(total=side.count, desc=label, unit="img", leave=False) as bar:
        for images in side.batches():
            if not len(first_images):
                first_images = images[:NUM_ROWS]
            batch = extractor(images)
            moments.update(batch)
            if keep_features:
                features[moments.n - len(batch) : moments.n] = batch
            if networks.classify:
                probabilities.append(networks.classify(images))
            bar.update(len(images))
    # The reader of shards skips a few unusable images.
    assert side.kind == "shards" or moments.n == side.count, (moments.n, side.count)
    if cached and moments.n == side.count:
        save_statistics(cached, moments.gaussian())
    return Measured(
        moments.gaussian(),
        features[: moments.n],
        torch.cat(probabilities) if probabilities else _EMPTY,
        first_images,
    )
