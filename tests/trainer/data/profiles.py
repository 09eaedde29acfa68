"""Colour profiles for tests: of RGB spaces, greys and inks, and hostile ones."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Mapping, Sequence

from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

Colorants = Sequence[tuple[float, float, float]]
"""X, Y and Z of red, green and blue, adapted to D50."""


def like_srgb(colorants: Colorants) -> bytes:
    """sRGB with other primaries."""
    profile = bytearray(SRGB)
    (count,) = struct.unpack_from(">I", profile, 128)
    for at in range(132, 132 + 12 * count, 12):
        tag, offset, _ = struct.unpack_from(">4sII", profile, at)
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            numbers = (round(x * 65536) for x in colorants["rgb".index(chr(tag[0]))])
            struct.pack_into(">3i", profile, offset + 8, *numbers)
    profile[84:100] = bytes(16)  # its checksum
    return bytes(profile)


DISPLAY_P3 = like_srgb([(0.515102, 0.241182, -0.00105), (0.291965, 0.692236, 0.041882), (0.157153, 0.066582, 0.784378)])
ADOBE_RGB = like_srgb([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
SWAPPED = like_srgb([(0.1430, 0.0606, 0.7141), (0.3851, 0.7169, 0.0971), (0.4361, 0.2225, 0.0139)])
"""Red and blue change places."""


def made_of(
    tags: Mapping[bytes, bytes], space: bytes, kind: bytes = b"mntr", pcs: bytes = b"XYZ ", declared: int | None = None
) -> bytes:
    """A profile with these tags, each with its type.

    Args:
        kind: the class of device.
        declared: the number of tags according to the profile; None for the true one.
    """
    table, body = b"", b""
    start = 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    illuminant = (0xF6D6, 0x10000, 0xD32D)
    size = start + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s28x3i48x", size, 0x02400000, kind, space, pcs, b"acsp", *illuminant)
    return header + struct.pack(">I", len(tags) if declared is None else declared) + table + body


def grey(gamma: float) -> bytes:
    curve = struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))
    return made_of({b"wtpt": struct.pack(">4s4x3i", b"XYZ ", 0xF6D6, 0x10000, 0xD32D), b"kTRC": curve}, b"GRAY")


def inks() -> bytes:
    """CMYK inks, of which cyan and yellow change places: cyan ink is yellow."""
    corners = []
    for c, m, y, k in itertools.product((0, 1), repeat=4):
        image = Image.new("RGB", (1, 1), tuple(255 * (1 - ink) * (1 - k) for ink in (y, m, c)))
        lab = ImageCms.createProfile("LAB")
        pixel = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
        assert pixel is not None
        corners.append(pixel.tobytes())
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(0x10000 if i % 4 == 0 else 0 for i in range(9)))
    # Pillow's a and b are signed, those of a profile have an offset of 128.
    lattice = b"".join(bytes((lightness, a ^ 128, b ^ 128)) for lightness, a, b in corners)
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4 + lattice + identity * 3
    return made_of({b"A2B0": table}, b"CMYK", b"prtr", b"Lab ")


def endless() -> bytes:
    """Display P3 with a program of 900 curves of 1,000 segments in 35 kB, for which Little CMS needs minutes."""
    segments, elements = 1000, 300
    breaks = struct.pack(f">{segments - 1}f", *(i / segments for i in range(1, segments)))
    line = struct.pack(">4s4xHH4f", b"parf", 0, 0, 1.0, 1.0, 0.0, 0.0)
    curve = struct.pack(">4s4xHH", b"curf", segments, 0) + breaks + line * segments
    element = struct.pack(">4s4x2H", b"cvst", 3, 3) + struct.pack(">II", 36, len(curve)) * 3 + curve
    places = struct.pack(">II", 16 + 8 * elements, len(element)) * elements  # all elements are this one
    program = struct.pack(">4s4x2HI", b"mpet", 3, 3, elements) + places + element
    return made_of({**tags_of(DISPLAY_P3), b"D2B1": program}, b"RGB ")


def tags_of(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(count))
    return {tag: profile[offset : offset + length] for tag, offset, length in entries}


def expressed_in(profile: bytes, image: Image.Image) -> Image.Image:
    """The same colours in the space of an RGB profile, as far as it has them."""
    converted = ImageCms.profileToProfile(image, io.BytesIO(SRGB), io.BytesIO(profile))
    assert converted is not None
    converted.info = {}  # otherwise some formats would be written with the profile
    return converted
