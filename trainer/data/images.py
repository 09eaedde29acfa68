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
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from trainer.data.colours import declared_profile, to_srgb, without_declarations
from trainer.data.reasons import reason_of

try:
    import pillow_heif
except ModuleNotFoundError:  # not a dependency: its wheels contain an encoder under the GPL
    pass
else:
    pillow_heif.register_heif_opener()

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: a quarter GiB as RGB, above which Pillow warns of decompression bombs."""

# Not all formats of Pillow: some start other programs (EPS: Ghostscript). Image.open raises KeyError for a format that
# is not installed (AVIF before Pillow 11.3).
Image.init()
_FORMATS = tuple(
    f for f in ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000") if f in Image.OPEN
)

# What Pillow's decoders raise for damaged and malicious files; they have no common error class.
_BROKEN = (
    OSError,
    ArithmeticError,
    AssertionError,
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

_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_EITHER = {b"mif1", b"msf1"}  # an image or a sequence, of any codec
_MAX_FTYP = 1024  # bytes; files list some ten brands of four

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
_SIDEWAYS = (5, 6, 7, 8)  # these swap width and height


class ImageError(ValueError):
    """A file that is not a usable image. The message is one line, ``kind`` or ``kind: detail``; kinds are listed in
    rejected.csv and counted by ``catdata build``."""


@dataclass(frozen=True)
class Decoded:
    """A decoded file.

    Attributes:
        image: upright, 8-bit sRGB.
        size: (width, height) of the upright original, which is larger if it was decoded at a reduced size.
        ignores_profile: the colour profile cannot be used, so that the colours are the file's own.
    """

    image: Image.Image
    size: tuple[int, int]
    ignores_profile: bool


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in ``data`` as upright 8-bit sRGB; of an animation or of several pages, the first.

    Raises:
        ImageError: empty, not an image, truncated, damaged, or more than ``max_pixels`` according to its header (before
            memory is allocated for the pixels).
    """
    return decode_reduced(data, None, max_pixels).image


def decode_reduced(data: bytes, side: int | None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode an image that will be resized to ``side`` pixels.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time. Its shorter side keeps at least
    twice ``side`` pixels, so that the quality depends on the filter of the final resize.

    Args:
        side: None: decode all pixels.

    Raises:
        ImageError: as for ``decode``.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with warnings.catch_warnings(action="ignore"), _open(data) as image:
            stored = image.size
            if stored[0] * stored[1] > max_pixels:
                raise ImageError(f"too large: {stored[0]}x{stored[1]}, at most {max_pixels:,} pixels")
            is_reduced = False
            if side is not None and image.format in ("JPEG", "MPO"):  # of a HEIC, a draft would be its thumbnail
                is_reduced = image.draft(None, (2 * side, 2 * side)) is not None
            image.load()
            if not is_reduced:
                stored = image.size  # loading a TIFF turns it
            # Not before: the orientation of a PNG may follow its pixels, and that of a TIFF is then applied.
            orientation = _orientation(image)
            rgb, uses_profile = to_rgb(image)
            if orientation in _TURNS:
                rgb = rgb.transpose(_TURNS[orientation])
            return Decoded(rgb, stored[::-1] if orientation in _SIDEWAYS else stored, not uses_profile)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"too large: at most {max_pixels:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError(_unidentified(data)) from None
    except _BROKEN as error:
        raise ImageError(f"not readable: {reason_of(error)}") from error


def _open(data: bytes) -> Image.Image:
    """Open a file, also if Pillow refuses it for what does not concern the pixels.

    Raises:
        UnidentifiedImageError and others: Pillow cannot read it.
    """
    if brands := _brands(data):
        if data[8:12] not in _AVIF:
            data = data[:8] + b"mif1" + data[12:]  # the plugins look at the first brand only, and both try this one
        # Of a damaged AVIF pillow-heif would say that a decoder is missing.
        formats = ("AVIF",) if brands & _AVIF and not brands & _HEIC else ("AVIF", "HEIF")
        return Image.open(io.BytesIO(data), formats=[f for f in formats if f in _FORMATS])
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.UnidentifiedImageError, ValueError):
        if (plain := without_declarations(data)) is None:
            raise
    image = Image.open(io.BytesIO(plain), formats=_FORMATS)
    image.info["icc_profile"] = None  # as Pillow does for profiles that it finds damaged
    return image


def _brands(data: bytes) -> set[bytes]:
    """The brands of a HEIF file, which AVIF and HEIC are; empty for other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), len(data), _MAX_FTYP)
    return {data[at : at + 4] for at in (8, *range(16, end, 4))} & (_AVIF | _HEIC | _EITHER)


def _unidentified(data: bytes) -> str:
    """Why Pillow cannot identify a file."""
    brands = _brands(data)
    if brands & _AVIF and not features.check("avif"):
        return "not readable: AVIF needs Pillow 11.3 or newer with AVIF; or save it as JPEG"
    if "HEIF" not in _FORMATS and (brands & _HEIC or (brands and not brands & _AVIF)):
        return "not readable: HEIC needs pillow-heif (pip install pillow-heif); or save it as JPEG"
    return "not readable: damaged HEIC or AVIF" if brands else "not a picture"


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Convert any mode of Pillow to 8-bit sRGB. Returns the image, and whether its colour profile could be used.

    Transparent images are composited on white. High bit depths are scaled to 8 bits: 16-bit and 32-bit integers from
    0..65535, floats from 0..1 if no value exceeds 2, since resizing overshoots, otherwise from 0..255. CMYK without a
    profile is converted by formula.

    Raises:
        ValueError, OSError and others: the pixels are damaged or not finite. ``decode`` raises ImageError instead.
    """
    image.load()
    profile = declared_profile(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    image, uses_profile = to_srgb(image, profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.info = {}  # profile and orientation were those of the file
    return image, uses_profile


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
    transparent = pixels == image.info.get("transparency")
    if image.mode != "F":
        pixels /= 257.0
    elif pixels.max() <= 2.0:
        pixels *= 255.0
    pixels[transparent] = 255.0
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
