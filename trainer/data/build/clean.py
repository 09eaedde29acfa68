"""Pictures that would teach a generator nothing good: banners, darkness, blank pages and blur.

The limits are for cropped faces. They let through every usable one of 12,000 photographs of cats at 64x64 and 128x128,
of which they reject one: a crop of a wall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_ASPECT = 3.0
"""Longer over shorter side of the original: photographs have 1 to 2, phones' panoramas and banners more than 3."""

MIN_HIGHLIGHT = 30.0
"""Luminance (0 to 255) of the brightest hundredth. Black cats at night have 41 and more, thanks to their eyes."""

MIN_CONTRAST = 8.0
"""Standard deviation of the luminance (0 to 255). Blank pages and walls have up to 6, the dullest face 8.5."""

MIN_SHARPNESS = 0.5
"""See ``sharpness``. Photographs have 0.6 to 4 and 2 to 3 as a rule; enlarged twice 0.5 to 1.2, four times 0.3; behind
a Gaussian blur of 1, 1.3 and 2 pixels about 0.6, 0.4 and 0.2."""

_MEASURED = 128
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Flaw:
    """Why a picture is not worth keeping: the score that passed its limit. ``str`` gives the reason on one line."""

    kind: str
    score: float
    limit: float
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def shape_flaw(width: int, height: int) -> Flaw | None:
    """What is wrong with the shape of an original of ``width`` x ``height`` pixels: "too narrow"."""
    aspect = max(width, height) / min(width, height)
    if aspect <= MAX_ASPECT:
        return None
    return Flaw("too narrow", aspect, MAX_ASPECT, f"{width}x{height}, at most {MAX_ASPECT:g} to 1")


def picture_flaws(picture: Image.Image) -> list[Flaw]:
    """What is wrong with a square RGB picture of the size that is trained on, 8 pixels or more: "too dark", "flat",
    "blurred", in this order. What is nearly black is flat as well, and the first flaw says best what it is.

    Measured at 128 pixels at most, since larger photographs are seldom sharp to the pixel and good all the same: of a
    picture at 1024, a Gaussian blur below about 9 pixels passes.
    """
    if picture.width > _MEASURED:
        picture = picture.resize((_MEASURED, _MEASURED), Image.Resampling.LANCZOS)
    luma = np.asarray(picture, np.float32) @ _LUMA
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
    """How fine the structure of a picture is, luminance [h, w] of any range: 0 (smooth) to 8 (a checkerboard).

    The energy of the Laplacian over that of the gradient, both by finite differences. A wave of angular frequency w
    per pixel has 2 - 2 cos w, about w squared, along each axis, so this is the mean of that, weighted by the gradient
    energy. White noise has 5, and 0 is also what one colour has.

    The variance of the Laplacian alone (Pech-Pacheco et al., ICPR 2000) measures contrast as much as sharpness.
    Dividing it by the variance of the picture is not enough: a soft white cat before black needs few sharp edges for
    much variance. Of faces blurred by 1 pixel at 64x64 this found 68% where it rejected 0.2% of the photographs; with
    the gradient below the line it is 99.8%.
    """
    luma = luma.astype(np.float64)
    dy, dx = np.diff(luma, axis=0), np.diff(luma, axis=1)
    laplacian = np.diff(dy, axis=0)[:, 1:-1] + np.diff(dx, axis=1)[1:-1]
    gradient = np.square(dy).mean() + np.square(dx).mean()
    return float(np.square(laplacian).mean() / gradient) if gradient else 0.0
