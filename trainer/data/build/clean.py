"""Checks for images that are of no use in training: banners, dark images, blank pages and blurred images.

The limits are for cropped faces. Of 12,000 photographs of cats, cropped to 64x64 and 128x128, they reject one, which
shows a wall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_ASPECT = 3.0
"""Longer over shorter side of the original: photographs have 1 to 2, panoramas and banners more than 3."""

MIN_HIGHLIGHT = 30.0
"""The 99th percentile of the luminance (0 to 255). Black cats at night have 41 and more, because of their eyes."""

MIN_CONTRAST = 8.0
"""Standard deviation of the luminance (0 to 255). Blank pages and walls have up to 6, the dullest face has 8.5."""

MIN_SHARPNESS = 0.5
"""See ``sharpness``. Photographs have 0.6 to 4, mostly 2 to 3; enlarged twice 0.5 to 1.2, four times 0.3; after a
Gaussian blur of 1, 1.3 and 2 pixels about 0.6, 0.4 and 0.2."""

_MEASURED_SIZE = 128  # pixels
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Flaw:
    """A failed check.

    Attributes:
        kind: of reason, as in ``rejected.csv``.
        score: what was measured.
        limit: what ``score`` had to reach, or not to exceed.
        detail: both in words. ``str`` of a flaw gives ``kind: detail``, on one line.
    """

    kind: str
    score: float
    limit: float
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def shape_flaw(width: int, height: int) -> Flaw | None:
    """The flaw "too narrow" if an original of ``width`` x ``height`` pixels has it."""
    aspect = max(width, height) / min(width, height)
    if aspect <= MAX_ASPECT:
        return None
    return Flaw("too narrow", aspect, MAX_ASPECT, f"{width}x{height}, at most {MAX_ASPECT:g} to 1")


def image_flaws(image: Image.Image) -> list[Flaw]:
    """The flaws "too dark", "flat" and "blurred", in this order, of a square RGB image of 8 pixels or more.

    A nearly black image has all three; the first one describes it best.

    Larger images are measured at 128 pixels, because large photographs are rarely sharp to the pixel and good all the
    same. So of an image of 1024 pixels a Gaussian blur of less than about 9 pixels passes.
    """
    if image.width > _MEASURED_SIZE:
        image = image.resize((_MEASURED_SIZE, _MEASURED_SIZE), Image.Resampling.LANCZOS)
    luma = np.asarray(image, np.float32) @ _LUMA
    highlight = float(np.quantile(luma, 0.99))
    contrast = float(luma.std())
    sharp = sharpness(luma)
    flaws = []
    if highlight < MIN_HIGHLIGHT:
        detail = f"99% of it is below {highlight:.0f} of 255, {MIN_HIGHLIGHT:g} is needed"
        flaws.append(Flaw("too dark", highlight, MIN_HIGHLIGHT, detail))
    if contrast < MIN_CONTRAST:
        detail = f"brightness deviates by {contrast:.1f} of 255, {MIN_CONTRAST:g} is needed"
        flaws.append(Flaw("flat", contrast, MIN_CONTRAST, detail))
    if sharp < MIN_SHARPNESS:
        detail = f"sharpness {sharp:.2f}, {MIN_SHARPNESS:g} is needed"
        flaws.append(Flaw("blurred", sharp, MIN_SHARPNESS, detail))
    return flaws


def sharpness(luma: NDArray[np.float32]) -> float:
    """How fine the structures of an image are, from 0 (smooth, or one colour) to 8 (a checkerboard).

    Args:
        luma: [h, w], luminance in any range.

    The energy of the Laplacian over the energy of the gradient, both by finite differences. For a wave of angular
    frequency w per pixel along an axis the ratio is 2 - 2 cos w, about w squared, so the score is the mean of w
    squared, weighted by gradient energy. White noise has 5.

    The variance of the Laplacian alone (Pech-Pacheco et al., ICPR 2000) measures contrast as much as sharpness, and
    dividing it by the variance of the image does not help enough: a softly lit white cat on black has a high variance
    but few sharp edges. At the limit that rejects 0.2% of the photographs, that ratio detects 68% of the 64x64 faces
    blurred by 1 pixel; with the gradient energy as the divisor it is 99.8%.
    """
    luma = luma.astype(np.float64)
    dy, dx = np.diff(luma, axis=0), np.diff(luma, axis=1)
    laplacian = np.diff(dy, axis=0)[:, 1:-1] + np.diff(dx, axis=1)[1:-1]
    gradient = np.square(dy).mean() + np.square(dx).mean()
    return float(np.square(laplacian).mean() / gradient) if gradient else 0.0
