"""Export the same generator in several precisions, and compare these with fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from catgan.command import say
from export import directions
from export.evaluate import evaluate_file
from export.generator import export_onnx, metadata
from infer.latents import latents
from infer.session import Generator
from trainer import models
from trainer.metrics import classes
from trainer.metrics.evaluate import Evaluator

MAX_LOSS = 0.05
"""Largest accepted relative increase of the metric over that of fp32."""

_NUM_IMAGES = 64  # compared with fp32
_ROUNDS, _IMAGES_PER_ROUND = 15, 8  # of timing


@dataclass(frozen=True)
class Variant:
    """One exported file and its comparison with fp32 (None: it is fp32 itself, or not measured)."""

    precision: str
    bytes: int
    max_abs_diff: float
    """Largest difference from PyTorch in fp32, for images in [-1, 1]."""
    pixels: float | None = None
    """Largest difference from fp32 in pixel values, 0 to 255."""
    psnr: float | None = None
    """Peak signal-to-noise ratio to fp32 in dB."""
    size: float | None = None
    """File size relative to fp32."""
    speed: float | None = None
    """Images per second relative to fp32, one at a time on this machine's CPU."""
    metric: dict[str, Any] | None = None
    """Result of ``export.evaluate.evaluate_file``."""
    loss: float | None = None
    """Relative increase of the metric over that of fp32 (0.05: 5% worse)."""

    def summary(self) -> dict[str, Any]:
        """The known values as a JSON object."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        if self.metric is not None:
            known["metric"] = {key: self.metric[key] for key in ("name", "value", "relative")}
        return known


def make_variants(
    generator: models.Generator,
    info: Mapping[str, Any],
    paths: Mapping[str, Path],
    uint8: bool = False,
    evaluator: Evaluator | None = None,
) -> list[Variant]:
    """Export ``generator`` once per precision, fp32 first.

    Args:
        paths: precision -> file to write; must contain fp32.
        evaluator: evaluates each file, if given.

    Raises:
        UserError: a file generates other images than PyTorch, see ``export_onnx``.
    """
    entries = metadata(info) | directions.metadata(generator)
    reference = paths["fp32"]
    variants: list[Variant] = []
    for precision, path in sorted(paths.items(), key=lambda item: item[0] != "fp32"):
        say(f"exporting {precision}")
        difference = export_onnx(generator, path, entries, precision, uint8)
        metric = evaluate_file(path, evaluator) if evaluator else None
        variant = Variant(precision, path.stat().st_size, difference, metric=metric)
        variants.append(variant if path is reference else _compare(variant, path, variants[0], reference))
    return variants


def _compare(variant: Variant, path: Path, reference: Variant, reference_path: Path) -> Variant:
    """``variant`` with all that is relative to ``reference``."""
    ours, theirs = Generator(path, "cpu"), Generator(reference_path, "cpu")
    z = latents(range(_NUM_IMAGES), ours.z_dim)
    label = classes.in_turn(ours, _NUM_IMAGES)
    difference = ours(z, label=label).astype(np.float64) - theirs(z, label=label)
    noise = np.square(difference).mean()
    loss = None
    if variant.metric is not None and reference.metric is not None:
        loss = variant.metric["value"] / reference.metric["value"] - 1
    return replace(
        variant,
        pixels=float(np.abs(difference).max()),
        psnr=float(10 * np.log10(255**2 / noise)) if noise else None,
        size=variant.bytes / reference.bytes,
        speed=_relative_speed(ours, theirs),
        loss=loss,
    )


def _relative_speed(ours: Generator, theirs: Generator) -> float:
    """Median ratio of times; the two alternate, so that other load on the machine slows both."""
    z = latents(range(_IMAGES_PER_ROUND), ours.z_dim)
    ratios = []
    for _ in range(_ROUNDS):
        seconds = [_seconds(generator, z) for generator in (theirs, ours)]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(generator: Generator, z: np.ndarray) -> float:
    began = time.perf_counter()
    generator(z)
    return time.perf_counter() - began


def degraded(variants: Sequence[Variant]) -> list[Variant]:
    """The variants whose metric is more than 5% worse than that of fp32, or NaN."""
    return [v for v in variants if v.loss is not None and not v.loss <= MAX_LOSS]
