"""From the generator's output to pictures, and from pictures to one sheet."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float ``[n, 3, H, W]``, clipped to [-1, 1], as uint8 ``[n, H, W, 3]``: -1 is 0, 1 is 255, rounded between."""
    scaled = np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def grid_shape(n: int, columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) that hold ``n`` >= 1 pictures: as near to a square as possible unless ``columns`` is given."""
    columns = columns or math.isqrt(n - 1) + 1
    return -(-n // columns), columns


def grid(pictures: np.ndarray, columns: int | None = None) -> Image.Image:
    """One RGB sheet of ``pictures`` uint8 ``[n, H, W, 3]``, n >= 1, row by row without gaps; spare cells are white."""
    n, height, width, channels = pictures.shape
    assert pictures.dtype == np.uint8, pictures.dtype
    assert channels == 3, pictures.shape
    rows, columns = grid_shape(n, columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet
