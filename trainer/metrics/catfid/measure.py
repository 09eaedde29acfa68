"""Two sides to numbers: features of each side once, then every metric that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from catgan.command import say
from infer.latents import latents
from infer.session import Generator
from trainer.features.extractors import Extractor
from trainer.metrics.catfid.manifold import authenticity, density_coverage, precision_recall
from trainer.metrics.catfid.neighbours import SHOWN
from trainer.metrics.catfid.paths import path_length
from trainer.metrics.catfid.scores import cat_share, inception_score
from trainer.metrics.catfid.sides import Pictures
from trainer.metrics.evaluate import cached_statistics, recall_statistics, remember_statistics
from trainer.metrics.frechet import Gaussian, Moments, frechet_distance
from trainer.metrics.intervals import frechet_error, kernel_error
from trainer.metrics.kernel import kernel_distance


@dataclass(frozen=True)
class Measured:
    """What is known of a side: statistics; the first pictures; and, where they are to be kept, features ``[n, dim]``
    and the classes' probabilities ``[n, 1000]``."""

    gaussian: Gaussian
    shown: Tensor
    features: Tensor
    probabilities: Tensor


def measure(
    side: Pictures | Gaussian,
    what: str,
    extractor: Extractor,
    keep: bool,
    classify: Callable[[Tensor], Tensor] | None = None,
) -> Measured:
    """Look at each picture of a side once; at none if only statistics are needed and those of a data set are cached.

    Args:
        what: the side's name in the progress bar.
        keep: the features, not only their statistics.
        classify: what also looks at the pictures.
    """
    shown = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    nothing = torch.empty(0, extractor.dim, device=extractor.device)
    classes = [torch.empty(0, 1000)]
    if isinstance(side, Gaussian):
        return Measured(side, shown, nothing, classes[0])
    cached = None
    if side.shards and not keep:
        cached = cached_statistics(*side.shards, extractor)
        if known := recall_statistics(cached):
            say(f"{what}: statistics of {side.count:,} pictures from {cached}")
            return Measured(known, shown, nothing, classes[0])
    kept = torch.empty(side.count, extractor.dim, device=extractor.device) if keep else nothing
    moments = Moments(extractor.dim, extractor.device)
    with tqdm(total=side.count, desc=what, unit="img", leave=False) as bar:
        for images in side.batches():
            if not len(shown):
                shown = images[:SHOWN]
            features = extractor(images)
            moments.update(features)
            if keep:
                kept[bar.n : bar.n + len(features)] = features
            if classify:
                classes.append(classify(images))
            bar.update(len(images))
    # Unusable samples of shards are passed over, a few of them.
    assert side.kind == "shards" or moments.n == side.count, (moments.n, side.count)
    measured = Measured(moments.gaussian(), shown, kept[: moments.n] if keep else nothing, torch.cat(classes))
    if cached and moments.n == side.count:
        remember_statistics(cached, measured.gaussian)
    return measured


def distances(
    wanted: Collection[str], real: Measured, fake: Measured, extractor: Extractor, name: Callable[[str], str], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics by their full names, which ``name`` makes, and what goes with some of them."""
    values: dict[str, float] = {}
    more: dict[str, float] = {}
    if "fid" in wanted:
        values[name("fid")] = frechet_distance(real.gaussian, fake.gaussian)
    if "kid" in wanted:
        values[name("kid")], more["kid_std"] = kernel_distance(real.features, fake.features, seed)
    if "is" in wanted:
        values[name("is")], more["is_std"] = inception_score(extractor.logits(fake.features))
    if "pr" in wanted:
        values[name("precision")], values[name("recall")] = precision_recall(real.features, fake.features)
        values[name("density")], values[name("coverage")] = density_coverage(real.features, fake.features)
    if "cats" in wanted:
        values[name("cats").partition("_")[0]] = cat_share(fake.probabilities)
        more["cats_real"] = cat_share(real.probabilities)
    if "copies" in wanted:
        values[name("authenticity")] = authenticity(real.features, fake.features)
    return values, more


def errors(
    wanted: Collection[str], real: Measured, fake: Measured, name: Callable[[str], str], kid_std: float | None
) -> dict[str, float]:
    """Standard errors, by full names, of those of fid and kid that are wanted; ``kid_std`` is what ``distances`` found
    with kid."""
    found = {}
    if "fid" in wanted:
        found[name("fid")] = frechet_error(real.gaussian, fake.features)
    if "kid" in wanted:
        assert kid_std is not None
        found[name("kid")] = kernel_error(real.features, fake.features, kid_std)
    return found


def perceptual_path_length(generator: Generator, extractor: Extractor, num: int, seed: int) -> float:
    """``path_length`` of a generator file, over ``num`` paths."""

    def generate(z: np.ndarray) -> Tensor:
        return torch.from_numpy((generator.images(z).clip(-1, 1) + 1) * np.float32(127.5))

    with tqdm(total=num, desc="paths", unit="path", leave=False) as bar:
        return path_length(generate, extractor, partial(latents, z_dim=generator.z_dim), num, seed, bar.update)
