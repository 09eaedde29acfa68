"""Colours of decoded files: conversion to sRGB, which shards, networks and web pages expect, from what a file declares.

Phones write Display P3, cameras Adobe RGB, scanners and printers profiles of their own. Taken for sRGB, their colours
become paler or shift. Little CMS (``PIL.ImageCms``) converts them.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 4 << 20
"""Bytes of the largest ICC profile that is used; those of printing presses have up to 3 MB."""

SAME = 2
"""Levels of 255. A profile that changes no colour by more is one of the many versions of sRGB, or rounds as they do."""

_UNUSABLE = b""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DECLARATIONS = (b"iCCP", b"cHRM", b"gAMA", b"sRGB")

# Of devices and colour spaces. The other classes, such as device links, do not say what the colours of a file are.
_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")

_MAX_TAGS = 100  # Little CMS refuses a profile with more

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
# Otherwise the black of printing inks becomes dark grey.
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION

_GREYS = Image.frombytes("L", (256, 1), bytes(range(256)))
_LATTICE = Image.fromarray(np.indices((9, 9, 9)).reshape(3, 1, -1).transpose(1, 2, 0).astype(np.uint8) * 31)

_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green, blue
_SRGB_GAMMA = (0.43, 0.48)  # PNG's approximation of the curve of sRGB is 0.45455; so do decoders take what is near it
_GAMMAS = (0.3, 1.05)  # beyond these a file is wrong rather than unusual
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

# Transfer characteristics of ITU-T H.273: gamma of the encoding, or None for sRGB and, as decoders of still images do,
# video's curves. The others are for high dynamic range or unknown.
_TRANSFER_GAMMAS = {1: None, 2: None, 4: 1 / 2.2, 5: 1 / 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}


@dataclass(frozen=True)
class _Conversion:
    """From the colours of one profile to sRGB.

    Attributes:
        space: of the profile: "RGB", "CMYK" or "GRAY".
        transform: of RGB and CMYK images; None if the profile is sRGB, or for grey.
        table: [256], the sRGB level of each level of grey; None for CMYK, and if they are equal.
    """

    space: str
    transform: ImageCms.ImageCmsTransform | None = None
    table: tuple[int, ...] | None = None


def declared_profile(image: Image.Image) -> bytes | None:
    """The ICC profile of an opened file, or one with the meaning of PNG's gAMA and cHRM or of HEIF's nclx.

    None if the file declares nothing or sRGB; empty if what it declares makes no sense.
    """
    info = image.info
    if "icc_profile" in info:
        profile = info["icc_profile"]  # Pillow gives None for one that is incomplete, and TIFFs any type
        return profile if isinstance(profile, bytes) else _UNUSABLE
    if "nclx_profile" in info:
        return _of_nclx(info["nclx_profile"])
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        return _of_png(info.get("gamma"), info.get("chromaticity", _SRGB_CHROMATICITY))
    return None


def without_declarations(data: bytes) -> bytes | None:
    """A PNG or JPEG without what declares its colours, for files that Pillow refuses because of damage there.

    None if there is nothing of the kind, or the file is of another format.
    """
    if data.startswith(_PNG):
        parts = list(_png_chunks(data))
    elif data.startswith(b"\xff\xd8"):
        parts = list(_jpeg_segments(data))
    else:
        return None
    declarations = [(start, end) for start, end, declares_colours in parts if declares_colours]
    if not declarations:
        return None
    starts = [0, *(end for _, end in declarations)]
    ends = [*(start for start, _ in declarations), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _png_chunks(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Where each chunk before the pixels starts and ends, and whether it declares colours."""
    at = len(_PNG)
    while (kind := data[at + 4 : at + 8]) and kind != b"IDAT":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield at, end, kind in _PNG_DECLARATIONS
        at = end


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Where each segment before the pixels starts and ends, and whether it declares colours."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield at, end, data.startswith(b"\xe2", at + 1) and data.startswith(b"ICC_PROFILE\0", at + 4)
        at = end


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """Convert an image of 8-bit channels from the colours of ``profile``.

    Args:
        profile: see ``declared_profile``. None: Pillow converts the image, unmanaged.

    Returns:
        The image, RGB, or RGBA if it has transparency; and whether the profile could be used. One that is damaged, or
        of another colour space than the image, is ignored.
    """
    if profile is None:
        return _without_profile(image), True
    if image.mode == "LAB":  # which Pillow converts itself; a profile can only say the same
        return _without_profile(image), profile[16:20] == b"Lab "
    conversion = _conversion(profile)
    if conversion is None or (image.mode == "CMYK") != (conversion.space == "CMYK"):
        return _without_profile(image), False
    if conversion.space == "CMYK":
        assert conversion.transform is not None
        return conversion.transform.apply(image), True
    is_grey = image.mode in ("1", "L", "LA", "La")
    image = _without_profile(image)
    # Grey images are RGB in WebP and AVIF, and in Pillow's reading of 16-bit PNGs with transparency.
    if conversion.space == "GRAY" and not (is_grey or _is_neutral(image)):
        return image, False
    if is_grey or conversion.space == "GRAY":
        return _looked_up(image, conversion.table), True
    if conversion.transform is None:
        return image, True
    converted = conversion.transform.apply(image.convert("RGB"))
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted, True


def _without_profile(image: Image.Image) -> Image.Image:
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _is_neutral(image: Image.Image) -> bool:
    red, green, blue = (image.getchannel(channel).tobytes() for channel in "RGB")
    return red == green == blue


def _looked_up(image: Image.Image, table: tuple[int, ...] | None) -> Image.Image:
    if table is None:
        return image
    return image.point(table * 3 + (tuple(range(256)) if image.mode == "RGBA" else ()))


@functools.lru_cache(maxsize=32)
def _conversion(profile: bytes) -> _Conversion | None:
    """The conversion from an ICC profile; None if it cannot be used."""
    space = {b"RGB ": "RGB", b"GRAY": "GRAY", b"CMYK": "CMYK"}.get(profile[16:20])
    if space is None or profile[12:16] not in _CLASSES or len(profile) > MAX_PROFILE:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(_without_float_tags(profile)))
        # The fast version for grey is wrong by up to 10 levels in the shadows, and here it converts 256 pixels only.
        mode, flags = ("L", _FLAGS | ImageCms.Flags.NOOPTIMIZE) if space == "GRAY" else (space, _FLAGS)
        transform = ImageCms.ImageCmsTransform(opened, _SRGB, mode, "RGB", _INTENT, flags=flags)
    except (OSError, ValueError, struct.error):
        return None
    if space == "CMYK":
        return _Conversion(space, transform)
    greys = transform.apply(_GREYS.convert(mode)).getchannel("G")
    table = None if _differ_little(greys, _GREYS) else tuple(greys.tobytes())
    if space == "GRAY":
        return _Conversion(space, None, table)
    is_srgb = table is None and _differ_little(transform.apply(_LATTICE), _LATTICE)
    return _Conversion(space, None if is_srgb else transform, table)


def _differ_little(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= SAME)


def _without_float_tags(profile: bytes) -> bytes:
    """Rename the tags D2B0 to B2D3, which duplicate A2B0 to B2A2 in float, so that Little CMS ignores them.

    Their programs have no limit of length: a profile of 35 kB can occupy a processor for minutes.
    """
    (count,) = struct.unpack_from(">I", profile, 128)
    patched = bytearray(profile)
    for at in range(132, min(132 + 12 * count, 132 + 12 * _MAX_TAGS, len(profile)), 12):
        if profile[at : at + 3] in (b"D2B", b"B2D"):
            patched[at : at + 4] = b"none"
    return bytes(patched)


def _of_nclx(nclx: dict[str, Any]) -> bytes | None:
    """The profile for the code points of a HEIF file, as pillow-heif gives them."""
    if nclx["color_primaries"] == 2:  # unspecified
        return None
    if nclx["transfer_characteristics"] not in _TRANSFER_GAMMAS:
        return _UNUSABLE
    points = [nclx[f"color_primary_{name}_{axis}"] for name in ("white", "red", "green", "blue") for axis in "xy"]
    return _matrix_profile(tuple(points), _TRANSFER_GAMMAS[nclx["transfer_characteristics"]])


def _of_png(gamma: float | None, chromaticity: tuple[float, ...]) -> bytes:
    if gamma is None or _SRGB_GAMMA[0] <= gamma <= _SRGB_GAMMA[1]:
        return _matrix_profile(chromaticity, None)
    return _matrix_profile(chromaticity, gamma) if _GAMMAS[0] <= gamma <= _GAMMAS[1] else _UNUSABLE


@functools.lru_cache(maxsize=32)
def _matrix_profile(chromaticity: tuple[float, ...], gamma: float | None) -> bytes:
    """An ICC profile of an RGB space, empty if there can be none.

    Args:
        chromaticity: x and y of white, red, green and blue.
        gamma: exponent of the encoding; None for the curve of sRGB.
    """
    points = np.array(chromaticity).reshape(4, 2)
    if not (np.isfinite(points).all() and (points[:, 1] > 0).all()):
        return _UNUSABLE
    white, *primaries = (np.array([x, y, 1 - x - y]) / y for x, y in points)
    try:
        matrix = np.stack(primaries, 1)
        matrix = matrix * np.linalg.solve(matrix, white)
        adaptation = np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white))
        colorants = np.linalg.solve(_BRADFORD, adaptation @ _BRADFORD @ matrix).T
        if not (np.abs(colorants) < 4).all():
            return _UNUSABLE
    except np.linalg.LinAlgError:
        return _UNUSABLE
    if gamma is None:
        curve = _parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = _parametric(0, 1 / gamma)
    tags = {}
    for channel, colorant in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags[channel + b"XYZ"] = struct.pack(">8s3i", b"XYZ ", *(round(v * 65536) for v in colorant))
        tags[channel + b"TRC"] = curve
    return _profile_of(tags)


def _parametric(function: int, *parameters: float) -> bytes:
    numbers = (round(parameter * 65536) for parameter in parameters)
    return struct.pack(f">8sHH{len(parameters)}i", b"para", function, 0, *numbers)


def _profile_of(tags: dict[bytes, bytes]) -> bytes:
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    illuminant = (round(v * 65536) for v in _D50)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x", start + len(body), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp", *illuminant
    )
    return header + table + body
