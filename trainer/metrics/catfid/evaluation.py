"""All metrics of one side against REAL."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from infer.latents import latents
from infer.session import Generator
from trainer.features.extractors import Extractor
from trainer.metrics import classes
from trainer.metrics.catfid.manifold import authenticity, density_coverage, precision_recall
from trainer.metrics.catfid.measure import Measured, Networks, measure
from trainer.metrics.catfid.options import NEED_IMAGES, Options
from trainer.metrics.catfid.paths import path_length
from trainer.metrics.catfid.scores import cat_share, inception_score
from trainer.metrics.catfid.sides import ImageSet, Side, num_images
from trainer.metrics.evaluate import metric_name
from trainer.metrics.frechet import frechet_distance
from trainer.metrics.intervals import frechet_error, kernel_error
from trainer.metrics.kernel import kernel_distance


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one side."""

    values: dict[str, float]
    """By full name, such as "fid50k"."""
    details: dict[str, float]
    """Further figures of some metrics: kid_std, is_std, cats_real."""
    errors: dict[str, float]
    """Standard errors by full name; empty unless asked for."""
    measured: Measured | None
    """Features and images of the side; None if no metric needs them."""


class SideEvaluator:
    """Evaluates sides by ``options.metrics`` against ``real`` (None if no metric needs it)."""

    def __init__(self, options: Options, networks: Networks, real: Measured | None) -> None:
        self.options, self.networks, self.real = options, networks, real

    def __call__(self, side: Side, label: str, seed: int) -> Evaluation:
        """Evaluate ``side``, which messages call ``label``; ``seed`` is that of ppl's paths."""
        options, extractor = self.options, self.networks.extractor
        values: dict[str, float] = {}
        details: dict[str, float] = {}
        errors: dict[str, float] = {}
        measured = None
        if self.real is not None and options.metrics != ("ppl",):
            keep_features = options.with_errors or not NEED_IMAGES.isdisjoint(options.metrics)
            measured = measure(side, label, self.networks, keep_features)
            values, details = feature_metrics(options.metrics, self.real, measured, extractor, options.seed)
            if options.with_errors:
                errors = standard_errors(options.metrics, self.real, measured, details.get("kid_std"))
        if "ppl" in options.metrics:
            assert isinstance(side, ImageSet)
            assert side.generator is not None
            values["ppl"] = perceptual_path_length(side.generator, extractor, side.count, seed)
        number = num_images(side)
        assert number is not None
        return Evaluation(self._full_names(values, number), details, self._full_names(errors, number), measured)

    def _full_names(self, values: dict[str, float], num_fake: int) -> dict[str, float]:
        full_name = partial(
            metric_name, extractor=self.networks.extractor.name, num_fake=num_fake, force=self.options.force
        )
        # "cats" always uses EfficientNet-Lite0's classes, so its name has no extractor.
        return {full_name(k).partition("_")[0] if k == "cats" else full_name(k): v for k, v in values.items()}


def feature_metrics(
    metrics: Collection[str], real: Measured, fake: Measured, extractor: Extractor, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of ``fake`` that are computed from features, by short name, and further figures of some of them."""
    values: dict[str, float] = {}
    details: dict[str, float] = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(real.gaussian, fake.gaussian)
    if "kid" in metrics:
        values["kid"], details["kid_std"] = kernel_distance(real.features, fake.features, seed)
    if "is" in metrics:
        values["is"], details["is_std"] = inception_score(extractor.logits(fake.features))
    if "pr" in metrics:
        values["precision"], values["recall"] = precision_recall(real.features, fake.features)
        values["density"], values["coverage"] = density_coverage(real.features, fake.features)
    if "cats" in metrics:
        values["cats"] = cat_share(fake.probabilities)
        details["cats_real"] = cat_share(real.probabilities)
    if "copies" in metrics:
        values["authenticity"] = authenticity(real.features, fake.features)
    return values, details


def standard_errors(
    metrics: Collection[str], real: Measured, fake: Measured, kid_std: float | None
) -> dict[str, float]:
    """Standard errors of fid and kid, by short name; ``kid_std`` is given by ``feature_metrics`` with kid."""
    errors = {}
    if "fid" in metrics:
        errors["fid"] = frechet_error(real.gaussian, fake.features)
    if "kid" in metrics:
        assert kid_std is not None
        errors["kid"] = kernel_error(real.features, fake.features, kid_std)
    return errors


def perceptual_path_length(generator: Generator, extractor: Extractor, num: int, seed: int) -> float:
    """``path_length`` of a generator file over ``num`` paths."""

    def generate(z: np.ndarray, first: int) -> Tensor:
        images = generator.output(z, label=classes.in_turn(generator, len(z), first))
        return torch.from_numpy((images.clip(-1, 1) + 1) * np.float32(127.5))

    with tqdm(total=num, desc="paths", unit="path", leave=False) as bar:
        return path_length(generate, extractor, partial(latents, z_dim=generator.z_dim), num, seed, bar.update)
