"""Contact sheets: grids of kept and of rejected images, to review a data set at a glance."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.grid import grid

IMAGES = 64
"""The most images on a sheet."""

_SIDE = 128  # pixels
_CAPTION = 16  # pixels


def kept_sheet(images: Iterable[bytes], size: int) -> Image.Image:
    """A sheet of encoded images of ``size`` pixels, at least one, each shown at 128 pixels at most."""
    side = min(size, _SIDE)
    return grid(
        np.stack([np.asarray(_decode(image).resize((side, side), Image.Resampling.LANCZOS)) for image in images])
    )


def rejected_sheet(images: Mapping[str, list[bytes]]) -> Image.Image:
    """A sheet of encoded images, at least one, by kind of reason, which is written below each image.

    The sheet is shared evenly: kinds take turns until the sheet is full or their images run out.
    """
    rounds = itertools.zip_longest(*([(kind, image) for image in of_kind] for kind, of_kind in images.items()))
    tiles = [tile for turn in rounds for tile in turn if tile is not None][:IMAGES]
    tiles.sort(key=lambda tile: tile[0])
    return grid(np.stack([_tile(_decode(image), kind) for kind, image in tiles]))


def _decode(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def _tile(image: Image.Image, caption: str) -> np.ndarray:
    tile = Image.new("RGB", (_SIDE, _SIDE + _CAPTION), "white")
    tile.paste(image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    # A single space of this font is 2 pixels wide and hardly visible.
    ImageDraw.Draw(tile).text((3, _SIDE + 2), caption.replace(" ", "  "), "black", ImageFont.load_default(11))
    return np.asarray(tile)
