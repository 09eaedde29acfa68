"""Contact sheets: what was kept and what was rejected, at a glance."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.grid import grid

IMAGES = 64  # on a sheet
_SIDE = 128
_CAPTION = 16  # pixels


def kept_sheet(pictures: Iterable[bytes], size: int) -> Image.Image:
    """Encoded pictures of ``size`` pixels, at 128 pixels at most; there must be one."""
    side = min(size, _SIDE)
    return grid(
        np.stack([np.asarray(_opened(picture).resize((side, side), Image.Resampling.LANCZOS)) for picture in pictures])
    )


def rejected_sheet(pictures: Mapping[str, list[bytes]]) -> Image.Image:
    """Encoded pictures by the kind of their reason, which is written below each; there must be one.

    Of each kind as many are shown as of the others, while there are some.
    """
    rounds = itertools.zip_longest(*([(kind, picture) for picture in some] for kind, some in pictures.items()))
    turns = [tile for turn in rounds for tile in turn if tile is not None][:IMAGES]
    turns.sort(key=lambda tile: tile[0])
    return grid(np.stack([_tile(_opened(picture), kind) for kind, picture in turns]))


def _opened(picture: bytes) -> Image.Image:
    with Image.open(io.BytesIO(picture)) as image:
        return image.convert("RGB")


def _tile(picture: Image.Image, caption: str) -> np.ndarray:
    tile = Image.new("RGB", (_SIDE, _SIDE + _CAPTION), "white")
    tile.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    ImageDraw.Draw(tile).text((3, _SIDE + 2), caption.replace(" ", "  "), "black", ImageFont.load_default(11))
    return np.asarray(tile)
