"""The same generator in several precisions: made, compared with fp32, and judged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from catgan.command import say
from export.evaluate import judge
from export.generator import export_onnx, metadata
from infer.latents import latents
from infer.session import Generator
from trainer.metrics.evaluate import Evaluator

MAX_LOSS = 0.05
"""Of the metric, relative to fp32: what loses more is not worth its size."""

_PICTURES = 64  # compared
_ROUNDS, _PER_ROUND = 15, 8  # timed


@dataclass(frozen=True)
class Variant:
    """One exported file, and how it compares with the generator in fp32 (``None``: is it, or not measured)."""

    precision: str
    bytes: int
    max_abs_diff: float
    """From PyTorch in fp32, on a scale from -1 to 1."""
    pixels: float | None = None
    """Largest difference from fp32 in pixel values, 0 to 255."""
    psnr: float | None = None
    """Peak signal-to-noise ratio to fp32 in dB."""
    size: float | None = None
    """Of the file, relative to fp32."""
    speed: float | None = None
    """Pictures a second relative to fp32, one at a time on this machine's CPU."""
    metric: dict[str, Any] | None = None
    loss: float | None = None
    """How much larger the metric is than that of fp32 (0.05: by 5%)."""

    def summary(self) -> dict[str, Any]:
        """As JSON for the user."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        if self.metric is not None:
            known["metric"] = {key: self.metric[key] for key in ("name", "value", "relative")}
        return known


def make_variants(
    generator: nn.Module,
    info: Mapping[str, Any],
    paths: Mapping[str, Path],
    uint8: bool = False,
    evaluator: Evaluator | None = None,
) -> list[Variant]:
    """Export ``generator`` once per precision, fp32 first: the others are compared with that.

    Args:
        paths: precision -> the file to write; fp32 has to be among them.
        evaluator: judges each, if given.

    Raises:
        UserError: a file draws other pictures, see ``export_onnx``.
    """
    reference = paths["fp32"]
    variants: list[Variant] = []
    for precision, path in sorted(paths.items(), key=lambda item: item[0] != "fp32"):
        say(f"exporting {precision}")
        difference = export_onnx(generator, path, metadata(info), precision, uint8)
        metric = judge(path, evaluator) if evaluator else None
        variant = Variant(precision, path.stat().st_size, difference, metric=metric)
        variants.append(variant if path is reference else _compared(variant, path, variants[0], reference))
    return variants


def _compared(variant: Variant, path: Path, reference: Variant, reference_path: Path) -> Variant:
    ours, theirs = Generator(path, "cpu"), Generator(reference_path, "cpu")
    z = latents(range(_PICTURES), ours.z_dim)
    difference = ours(z).astype(np.float64) - theirs(z)
    noise = np.square(difference).mean()
    loss = None
    if variant.metric is not None and reference.metric is not None:
        loss = variant.metric["value"] / reference.metric["value"] - 1
    facts = asdict(variant) | {
        "pixels": float(np.abs(difference).max()),
        "psnr": float(10 * np.log10(255**2 / noise)) if noise else None,
        "size": variant.bytes / reference.bytes,
        "speed": _speed(ours, theirs),
        "loss": loss,
    }
    return Variant(**facts)


def _speed(ours: Generator, theirs: Generator) -> float:
    """Runs take turns, so that whatever else the machine does slows both."""
    z = latents(range(_PER_ROUND), ours.z_dim)
    ratios = []
    for _ in range(_ROUNDS):
        seconds = [_seconds(generator, z) for generator in (theirs, ours)]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(generator: Generator, z: np.ndarray) -> float:
    began = time.perf_counter()
    generator(z)
    return time.perf_counter() - began


def loses_too_much(variants: Sequence[Variant]) -> list[Variant]:
    """Those whose metric is more than 5% worse than that of fp32, or no number."""
    return [v for v in variants if v.loss is not None and not v.loss <= MAX_LOSS]
