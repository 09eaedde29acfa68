"""Converts the generator's output to pixels, and arranges images on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # imported where they are used: most sheets have no text
    from PIL import ImageFont

_ROW_NAME = 30  # characters of a name beside a row


def to_uint8(output: np.ndarray) -> np.ndarray:
    """Float ``[n, 3, H, W]``, clipped to [-1, 1], as uint8 ``[n, H, W, 3]``: -1 is 0, 1 is 255, rounded between."""
    scaled = np.rint((np.clip(output, -1.0, 1.0) + 1.0) * 127.5)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def grid_shape(n: int, columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) for ``n`` >= 1 images: as close to a square as possible unless ``columns`` is given."""
    columns = columns or math.isqrt(n - 1) + 1
    return -(-n // columns), columns


def cell(size: int, labels: Sequence[str]) -> tuple[int, int]:
    """(width, height) in pixels of a cell of ``grid`` with an image of ``size`` and the longest of ``labels``."""
    if not labels:
        return size, size
    font = _font(size)
    width = max(math.ceil(font.getlength(text)) for text in labels)
    return max(size, width + 4), size + _line_height(font)


def margin(size: int, rows: Sequence[str]) -> int:
    """Width in pixels of the names ``rows`` beside rows of images of ``size``; 0 if there are none."""
    if not rows:
        return 0
    font = _font(size)
    return math.ceil(max(font.getlength(_short(text)) for text in rows)) + 8


def grid(
    images: np.ndarray, columns: int | None = None, labels: Sequence[str] = (), rows: Sequence[str] = ()
) -> Image.Image:
    """One RGB sheet of ``images`` uint8 ``[n, H, W, 3]``, n >= 1, row by row without gaps; unused cells are white.

    ``labels``, one per image or none, are written below the images, ``rows``, one per row or none, left of the rows,
    black on white.
    """
    n, height, width, channels = images.shape
    assert images.dtype == np.uint8, images.dtype
    assert channels == 3, images.shape
    assert len(labels) in (0, n), len(labels)
    height_in_cells, columns = grid_shape(n, columns)
    assert len(rows) in (0, height_in_cells), len(rows)
    beside = margin(width, rows)
    cell_width, line = (width, 0) if not labels else (cell(width, labels)[0], _line_height(_font(width)))
    sheet = Image.new("RGB", (beside + columns * cell_width, height_in_cells * (height + line)), "white")
    for i, image in enumerate(images):
        left, top = beside + i % columns * cell_width, i // columns * (height + line)
        sheet.paste(Image.fromarray(image), (left + (cell_width - width) // 2, top))
        if labels:
            from PIL import ImageDraw

            centre = (left + cell_width / 2, top + height + line / 2)
            ImageDraw.Draw(sheet).text(centre, labels[i], fill="black", font=_font(width), anchor="mm")
    for i, text in enumerate(rows):
        from PIL import ImageDraw

        middle = (beside - 4, i * (height + line) + height / 2)
        ImageDraw.Draw(sheet).text(middle, _short(text), fill="black", font=_font(width), anchor="rm")
    return sheet


def _short(text: str) -> str:
    return text if len(text) <= _ROW_NAME else text[: _ROW_NAME - 3] + "..."


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, legible below images of ``size`` pixels."""
    from PIL import ImageFont

    font = ImageFont.load_default(max(10, size // 10))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 2
