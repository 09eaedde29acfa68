"""HEIC files, if pillow-heif is installed; it is not a dependency."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer.data import profiles
from trainer.data.images import ImageError, decode, decode_reduced

pytest.importorskip("pillow_heif")


def motif() -> Image.Image:
    patches = np.random.default_rng(0).integers(40, 216, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((256, 192), Image.Resampling.BILINEAR)


def packed(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", quality=95, **options)
    return buffer.getvalue()


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, int) - np.asarray(other, int)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_whatever_the_orientation(orientation: int) -> None:
    """pillow-heif applies it."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = motif() if orientation == 1 else motif().transpose(stored[orientation])
    data = packed(image, exif=exif.tobytes())
    for side in (None, 16):
        decoded = decode_reduced(data, side)
        assert decoded.size == decoded.image.size == (256, 192)
        assert mean_difference(decoded.image, motif()) < 4


@pytest.mark.parametrize("declared_by", ["profile", "code points"])
def test_colours_of_a_phone(declared_by: str) -> None:
    options: dict[str, Any] = {"color_primaries": 12, "transfer_characteristics": 13}
    if declared_by == "profile":
        options = {"icc_profile": profiles.DISPLAY_P3}
    stored = profiles.expressed_in(profiles.DISPLAY_P3, motif())
    assert mean_difference(decode(packed(stored)), motif()) > 3
    assert mean_difference(decode(packed(stored, **options)), motif()) < 1


@pytest.mark.parametrize("brand", [b"mif1", b"msf1", b"heix", b"none"])
def test_other_major_brands(brand: bytes) -> None:
    data = packed(motif())
    assert mean_difference(decode(data[:8] + brand + data[12:]), motif()) < 4


def test_damaged_files() -> None:
    data = packed(motif())
    for cut in (30, 200, len(data) // 2, len(data) - 9):
        with pytest.raises(ImageError, match=r"^not readable: (?!HEIC needs)"):
            decode(data[:cut])
