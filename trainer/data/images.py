"""Files that claim to be pictures, made into square RGB pictures of one size.

The files come from strangers: everything that is wrong with one ends as an ``ImageError`` with a reason, never as
another exception, so that one bad file cannot stop the building of a data set.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""The most pixels a picture may have: a quarter GiB as RGB, the size at which Pillow warns of decompression bombs."""

# What people keep pictures in. Pillow knows more formats, and some of those start other programs (EPS: Ghostscript).
# Image.open raises KeyError for a format that this Pillow lacks (AVIF before 11.3), so ask it first.
Image.init()
_FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000") if f in Image.OPEN)

# What Pillow's readers let through on files made to break them. They are parsers without a common error class.
_BROKEN = (
    OSError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_SIDEWAYS = 5  # of the orientations: from here on width and height change places


class ImageError(ValueError):
    """A file that cannot be used as a picture. The message is the reason, ``kind`` or ``kind: detail``, on one line."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in ``data`` as RGB, upright; of an animation the first frame.

    Raises:
        ImageError: empty, no picture, truncated or damaged, or more than ``max_pixels`` (judged by the header, before
            any memory is taken for the pixels).
    """
    return decode_reduced(data, None, max_pixels)[0]


def decode_reduced(data: bytes, side: int | None, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, tuple[int, int]]:
    """Like ``decode``, for a picture to be reduced to ``side`` pixels, with (width, height) of the upright original.

    A JPEG with more than enough pixels is decoded at 1/2, 1/4 or 1/8 of its size, which costs a fraction of the time.
    The shorter side keeps twice ``side`` or more, so that the filter of the final reduction has the last word. None
    decodes all pixels.
    """
    if not data:
        raise ImageError("empty file")
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        raise ImageError("not readable: HEIC, save it as JPEG or PNG")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"too large: {width}x{height}, at most {max_pixels:,} pixels")
            if side is not None:
                image.draft(None, (2 * side, 2 * side))  # does nothing to what is no JPEG, or too small
            upright = _orientation(image) < _FIRST_SIDEWAYS
            return to_rgb(image), (width, height) if upright else (height, width)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"too large: at most {max_pixels:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError("not a picture") from None
    except _BROKEN as error:
        detail = " ".join(str(error).split())[:100] or type(error).__name__
        raise ImageError(f"not readable: {detail}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as upright 8-bit RGB.

    The EXIF orientation is applied; transparency is laid on white; CMYK goes through Pillow's plain conversion (no
    colour profiles). Deep grey is scaled to 8 bit: 16-bit and 32-bit integers from 0..65535, floats from 0..1 if
    nothing exceeds 1 and from 0..255 otherwise.

    Raises:
        ValueError, OSError and others: the pixels are damaged or not finite; ``decode`` wraps them in ``ImageError``.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 (upright) also for EXIF data that cannot be read: the pixels are still good."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN:
        return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite")
    if image.mode != "F":
        pixels /= 257.0
    elif pixels.max() <= 1.0:
        pixels *= 255.0
    return Image.fromarray(np.rint(pixels.clip(0.0, 255.0)).astype(np.uint8))


def to_square(image: Image.Image, size: int, crop: str) -> Image.Image:
    """An RGB picture as ``size`` x ``size`` (Lanczos); one that has this size already keeps its pixels.

    Args:
        crop: ``"center"`` cuts out the largest square in the middle, ``"none"`` takes square pictures only (squeezing
            or bordering the others would teach a generator squeezed or bordered cats).

    Raises:
        ImageError: ``"none"`` and the picture is not square.
    """
    width, height = image.size
    side = min(width, height)
    if crop == "none" and width != height:
        raise ImageError(f"not square: {width}x{height}, --crop center would cut it")
    left, top = (width - side) // 2, (height - side) // 2
    # Not resize(box=...): its kernel reaches beyond the box, and the result would depend on what is cut off.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def pixel_digest(image: Image.Image) -> bytes:
    """32 bytes that are equal for two RGB pictures if and only if their sizes and pixels are."""
    return hashlib.sha256(b"%dx%d:" % image.size + image.tobytes()).digest()


def encode(image: Image.Image) -> bytes:
    """An RGB picture as lossless WebP, the same bytes every time.

    Of the lossless settings of Pillow this one decodes fastest per byte: on faces of cats at 64x64 and 128x128 it
    takes 30% less room than the best PNG, is written twice as fast and read 5 to 40% faster. More effort (``method``
    above 0) costs 3 to 20 times the time for 5% of the size.
    """
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()
