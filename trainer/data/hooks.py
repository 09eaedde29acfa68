"""What looks into pictures while a data set is built. ``prepare`` and ``build`` take it from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KEEP = {
    "near-duplicate": "near-duplicate",
    "narrow": "too narrow",
    "dark": "too dark",
    "flat": "flat",
    "blurred": "blurred",
}
"""What ``--keep`` calls the kinds of reasons that can be switched off: {word: kind}."""


@dataclass(frozen=True)
class Flaw:
    """Why a picture is not worth keeping. ``str`` gives the reason on one line, ``kind: detail``."""

    kind: str
    score: float
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def shape_flaw(width: int, height: int) -> Flaw | None:
    """What is wrong with the shape of an original."""
    return None


def picture_flaws(picture: Image.Image) -> list[Flaw]:
    """What is wrong with a square RGB picture of the size that is trained on, worst first."""
    return []


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits, of which few differ between pictures that look alike."""
    return 0


def thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """A few pixels, of the same shape for all pictures."""
    return np.zeros((8, 8, 3), np.uint8)


def near_duplicates(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], pixels: NDArray[np.integer], keys: NDArray[np.generic]
) -> dict[int, tuple[int, int]]:
    """{index of a picture to drop: (index of the kept one that it is near, distance)}."""
    return {}


class FaceFinder:
    """Finds the faces of cats."""

    def find(self, image: Image.Image) -> list[Any]:
        """The faces in an RGB picture, best first."""
        return []


def crop_face(image: Image.Image, face: Any, size: int) -> Image.Image:
    """``face`` as a square RGB picture of ``size`` pixels."""
    raise NotImplementedError
