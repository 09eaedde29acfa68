"""Decoding untrusted image files, and making square RGB images of one size.

Whatever is wrong with a file, ``decode`` raises ``ImageError`` with the reason, and no other exception: one bad file
must not stop the building of a data set.
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
"""The largest image that is decoded: a quarter GiB as RGB, above which Pillow warns of decompression bombs."""

# Not all formats of Pillow: some start other programs (EPS: Ghostscript). Image.open raises KeyError for a format that
# the installed Pillow lacks (AVIF before 11.3).
Image.init()
_FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000") if f in Image.OPEN)

# What Pillow's decoders raise for damaged and malicious files; they have no common error class.
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
_FIRST_SIDEWAYS = 5  # orientations from here on swap width and height


class ImageError(ValueError):
    """A file that is not a usable image. The message is one line, ``kind`` or ``kind: detail``; kinds are listed in
    rejected.csv and counted by ``catdata build``."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in ``data`` as upright RGB; of an animation, the first frame.

    Raises:
        ImageError: empty, not an image, truncated, damaged, or more than ``max_pixels`` according to its header (before
            memory is allocated for the pixels).
    """
    return decode_reduced(data, None, max_pixels)[0]


def decode_reduced(data: bytes, side: int | None, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image that will be resized to ``side`` pixels; also returns (width, height) of the upright original.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time. Its shorter side keeps at least
    twice ``side`` pixels, so that the quality depends on the filter of the final resize.

    Args:
        side: None: decode all pixels.

    Raises:
        ImageError: as for ``decode``.
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
                image.draft(None, (2 * side, 2 * side))  # no effect on other formats, and on small images
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
    """Convert any mode of Pillow to upright 8-bit RGB.

    The EXIF orientation is applied; transparent images are composited on white; CMYK is converted without colour
    profiles. High bit depths are scaled to 8 bits: 16-bit and 32-bit integers from 0..65535, floats from 0..1 if no
    value exceeds 1, otherwise from 0..255.

    Raises:
        ValueError, OSError and others: the pixels are damaged or not finite. ``decode`` raises ImageError instead.
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
    """The EXIF orientation, 1..8; 1 (upright) if there is none or it cannot be read, since the pixels may be intact."""
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
    """Resize an RGB image to ``size`` x ``size`` (Lanczos); the pixels of an image of that size are kept.

    Args:
        crop: ``"center"``: crop to the largest square in the middle. ``"none"``: accept square images only; stretching
            or padding the others would teach a generator stretched or padded cats.

    Raises:
        ImageError: ``crop`` is ``"none"`` and the image is not square.
    """
    width, height = image.size
    side = min(width, height)
    if crop == "none" and width != height:
        raise ImageError(f"not square: {width}x{height}, --crop center would cut it")
    left, top = (width - side) // 2, (height - side) // 2
    # Not resize(box=...): its filter reads pixels outside the box.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 of the size and pixels of an RGB image, 32 bytes: equal for equal images, whatever their files."""
    return hashlib.sha256(b"%dx%d:" % image.size + image.tobytes()).digest()


def encode(image: Image.Image) -> bytes:
    """Encode an RGB image as lossless WebP; equal images give equal bytes.

    These settings decode fastest per byte of all lossless ones of Pillow. Faces of cats at 64x64 and 128x128 take 30%
    less space than as the best PNG, are encoded twice as fast and decoded 5 to 40% faster. More effort (``method``
    above 0) takes 3 to 20 times as long for 5% of the size.
    """
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()
