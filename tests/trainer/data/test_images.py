from __future__ import annotations

import io
import random
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from trainer.data.images import (
    MAX_PIXELS,
    ImageError,
    decode,
    decode_reduced,
    encode,
    pixel_digest,
    to_rgb,
    to_square,
)

RNG = np.random.default_rng(0)


def noise(width: int = 12, height: int = 8) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def color(image: Image.Image) -> tuple[int, ...]:
    """The colour of a uniform RGB image."""
    assert image.mode == "RGB"
    ((_, value),) = image.getcolors() or []
    assert isinstance(value, tuple)
    return value


def grey(image: Image.Image) -> list[int]:
    """The first row of an image whose channels are equal."""
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    image = noise()
    assert decode(packed(image, kind)).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_stay_close(kind: str) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    difference = np.asarray(decode(packed(image, kind)), int) - np.asarray(image, int)
    assert np.abs(difference).mean() < 3


# The corner (x, y in 0..1) of the stored image that becomes the upper left one, for each EXIF orientation.
@pytest.mark.parametrize(
    ("orientation", "corner", "turned"),
    [
        (1, (0, 0), False),
        (2, (1, 0), False),
        (3, (1, 1), False),
        (4, (0, 1), False),
        (5, (0, 0), True),
        (6, (0, 1), True),
        (7, (1, 1), True),
        (8, (1, 0), True),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "TIFF tiff_lzw", "TIFF jpeg"])
def test_exif_orientation(kind: str, orientation: int, corner: tuple[int, int], turned: bool) -> None:
    stored = Image.new("RGB", (32, 16))
    stored.paste("white", (corner[0] * 16, corner[1] * 8, corner[0] * 16 + 16, corner[1] * 8 + 8))
    options: dict[str, Any] = {"save_all": True, "append_images": [stored]} if kind == "MPO" else {}
    kind, _, compression = kind.partition(" ")
    if compression:
        options["compression"] = compression
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = packed(stored, kind, exif=exif, **options)
    for side in (None, 4):
        decoded = decode_reduced(data, side)
        image, scale = decoded.image, 2 if side and kind in ("JPEG", "MPO") else 1
        assert decoded.size == ((16, 32) if turned else (32, 16))
        assert image.size == (decoded.size[0] // scale, decoded.size[1] // scale)
        white = np.asarray(image.convert("L")) > 128
        half_height, half_width = image.height // 2, image.width // 2
        assert white[: half_height - 1, : half_width - 1].all()
        assert not white[half_height + 1 :].any()
        assert not white[:, half_width + 1 :].any()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_orientation_in_xmp(kind: str) -> None:
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    options: dict[str, Any] = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}
    decoded = decode_reduced(packed(noise(32, 16), kind, **options), None)
    assert decoded.size == decoded.image.size == (16, 32)


def test_orientation_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    image = noise()
    data = packed(image)
    decoded = decode_reduced(data[:-12] + chunk + data[-12:], None)
    assert decoded.size == (8, 12)
    assert decoded.image.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e30])
def test_orientations_that_are_no_orientation(value: float) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x0112] = TiffTags.DOUBLE
    tags[0x0112] = value
    assert decode_reduced(packed(noise(), "TIFF", tiffinfo=tags), None).size == (12, 8)


@pytest.mark.parametrize("resolution", [(0, 0), (1, 0), (0, 1), (2**32 - 1, 1)])
@pytest.mark.parametrize("unit", [1, 2, 3])
def test_resolutions_that_are_not_finite(unit: int, resolution: tuple[int, int]) -> None:
    """The size of a pixel on paper does not matter."""
    image = noise()
    data = packed(image, "TIFF", resolution=7777, resolution_unit=unit)
    stored = struct.pack("<II", 7777, 1)
    assert stored in data
    assert decode(data.replace(stored, struct.pack("<II", *resolution))).tobytes() == image.tobytes()


def test_damaged_exif_is_ignored() -> None:
    data = packed(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).size == (12, 8)


@pytest.mark.parametrize(
    ("mode", "fill", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_modes(mode: str, fill: Any, expected: tuple[int, int, int]) -> None:
    assert color(to_rgb(Image.new(mode, (3, 2), fill))[0]) == expected


def test_cmyk_jpeg() -> None:
    image = decode(packed(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.array(color(image)) - (255, 0, 0)).max() <= 3


def test_palette_and_its_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(packed(image))).tolist() == [[[200, 100, 50], [0, 0, 255]]]
    assert np.asarray(decode(packed(image, transparency=1))).tolist() == [[[200, 100, 50], [255, 255, 255]]]
    assert np.asarray(decode(packed(image, "GIF", transparency=1))).tolist() == [[[200, 100, 50], [255, 255, 255]]]


def test_transparent_colour_of_rgb_and_grey_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert np.asarray(decode(packed(image, transparency=(9, 9, 9)))).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    assert grey(decode(packed(image.convert("L"), transparency=9))) == [2, 255]


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_grey_is_scaled_to_8_bit(byte_order: str) -> None:
    values = np.array([[0, 257, 200 * 257, 65535, 300]], f"{byte_order}u2")
    image = Image.frombytes("I;16" if byte_order == "<" else "I;16B", (5, 1), values.tobytes())
    assert grey(to_rgb(image)[0]) == [0, 1, 200, 255, 1]
    for kind in ("PNG", "TIFF"):
        assert grey(decode(packed(image, kind))) == [0, 1, 200, 255, 1]


def test_32_bit_integers_and_floats() -> None:
    integers = np.array([[0, 257, 65535, 70000, -5]], np.int32)
    assert grey(decode(packed(Image.fromarray(integers), "TIFF"))) == [0, 1, 255, 255, 0]
    unit = np.array([[0.0, 0.5, 1.0, -1.0]], np.float32)
    assert grey(decode(packed(Image.fromarray(unit), "TIFF"))) == [0, 128, 255, 0]
    bytes_ = np.array([[0.0, 77.0, 255.0, 300.0]], np.float32)
    assert grey(decode(packed(Image.fromarray(bytes_), "TIFF"))) == [0, 77, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(value: float) -> None:
    pixels = np.array([[0.0, 1.0, value]], np.float32)
    portable = b"Pf\n3 1\n-1.0\n" + pixels.astype("<f4").tobytes()
    for data in (packed(Image.fromarray(pixels), "TIFF"), portable):
        with pytest.raises(ImageError, match=r"^not readable: pixels that are not finite$"):
            decode(data)


def test_floats_a_little_above_1_are_not_taken_for_almost_black() -> None:
    overshoot = np.array([[0.0, 0.5, 1.0, 1.1]], np.float32)
    assert grey(decode(packed(Image.fromarray(overshoot), "TIFF"))) == [0, 128, 255, 255]


def test_transparent_grey_of_a_16_bit_png() -> None:
    pixels = np.array([[0, 257, 300]], np.uint16)
    assert grey(decode(packed(Image.fromarray(pixels), transparency=300))) == [0, 1, 255]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_first_frame_of_an_animation(kind: str) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = packed(red, kind, save_all=True, append_images=[blue], **options)
    assert np.abs(np.asarray(decode(data), int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"meow\n", "not a picture"),
        (b"<!DOCTYPE html><html>404</html>", "not a picture"),
        (b"\0" * 4096, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "not a picture"),
    ],
)
def test_files_that_are_not_images(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


def with_brands(data: bytes, *brands: bytes) -> bytes:
    """A HEIF file with other brands, of which the first is the major one."""
    ftyp = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (4 + len(ftyp)).to_bytes(4, "big") + ftyp + data[int.from_bytes(data[:4], "big") :]


@pytest.mark.parametrize(
    "brands",
    [
        (b"avif", b"mif1", b"miaf"),
        (b"mif1", b"avif", b"miaf"),
        (b"mif1", b"miaf", b"MA1B", b"heic", b"avif"),
        (b"msf1", b"avif"),
        (b"miaf", b"avif"),
        (b"heic", b"mif1", b"avif"),
        (b"none", b"avif"),
    ],
)
def test_avif_with_any_brands(brands: tuple[bytes, ...]) -> None:
    data = packed(Image.new("RGB", (16, 16), "red"), "AVIF")
    places = data[int.from_bytes(data[:4], "big") :]
    moved = with_brands(data, *brands)
    # The pixels' place in the file is in the item location box.
    shift = len(moved) - len(data)
    at = places.index(b"iloc") + 4 + 4 + 2 + 2 + 2 + 2 + 2
    (offset,) = struct.unpack_from(">I", places, at)
    moved = moved[: -len(places)] + places[:at] + struct.pack(">I", offset + shift) + places[at + 4 :]
    assert np.abs(np.asarray(decode(moved), int) - (255, 0, 0)).max() <= 3


@pytest.mark.skipif("HEIF" in Image.OPEN, reason="pillow-heif is installed")
@pytest.mark.parametrize(
    "brands",
    [*((brand, b"mif1") for brand in (b"heic", b"heix", b"heim", b"hevc", b"hevx")), (b"mif1", b"heic"), (b"msf1",)],
)
def test_heic_names_what_is_missing(brands: tuple[bytes, ...]) -> None:
    with pytest.raises(ImageError, match=r"^not readable: HEIC needs pillow-heif"):
        decode(with_brands(b"", *brands) + bytes(200))


def test_damaged_avif_is_not_taken_for_heic() -> None:
    data = packed(noise(64, 64), "AVIF")
    for brands in ((b"avif", b"mif1"), (b"mif1", b"avif")):
        with pytest.raises(ImageError, match=r"^not readable: damaged HEIC or AVIF$"):
            decode(with_brands(data[:100], *brands))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files(kind: str) -> None:
    data = packed(noise(64, 64), kind)
    with pytest.raises(ImageError, match=r"^(not readable: .|not a picture$)"):
        decode(data[: len(data) // 2])


def test_random_damage_raises_only_image_errors() -> None:
    rng = random.Random(0)
    files = [packed(noise(40, 30), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
    reasons = []
    for _ in range(1500):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except ImageError as error:
            reasons.append(str(error))
    assert len(reasons) > 300
    assert not [reason for reason in reasons if re.search(r"\n|\(\)|<\w|\bb'|0x", reason)]


def test_the_pixel_limit_applies_to_the_header() -> None:
    # A PNG of a few bytes with 60,000 x 60,000 pixels, which would take 10 GiB.
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + side + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0"))
    with pytest.raises(ImageError, match="too large"):
        decode(bomb)
    assert decode(packed(noise(10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="too large: 10x11, at most 100 pixels"):
        decode(packed(noise(10, 11)), max_pixels=100)
    assert MAX_PIXELS > 8000 * 6000, "photos of cameras must be accepted"


def test_square_crops_to_the_middle() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    for upright in (image, image.transpose(Image.Transpose.ROTATE_90)):
        assert color(to_square(upright, 10, "center")) == (0, 0, 255)
        assert to_square(upright, 4, "center").size == (4, 4)


def test_square_keeps_the_pixels_of_an_image_of_that_size() -> None:
    image = noise(16, 16)
    for crop in ("center", "none"):
        assert to_square(image, 16, crop).tobytes() == image.tobytes()


def test_without_cropping_other_shapes_are_refused() -> None:
    assert to_square(noise(20, 20), 8, "none").size == (8, 8)
    with pytest.raises(ImageError, match="not square: 20x21"):
        to_square(noise(20, 21), 8, "none")


def test_resizing_averages() -> None:
    checker = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    small = np.asarray(to_square(checker, 8, "center"))
    assert np.abs(small.astype(int) - 127).max() <= 4, "a checkerboard becomes grey, not stripes"


def test_digest_depends_on_pixels_and_shape_only() -> None:
    image = noise(12, 8)
    assert pixel_digest(image) == pixel_digest(decode(packed(image, "BMP"))) == pixel_digest(decode(packed(image)))
    assert pixel_digest(image) != pixel_digest(Image.frombytes("RGB", (8, 12), image.tobytes()))
    changed = image.copy()
    changed.putpixel((0, 0), tuple(255 - v for v in image.getpixel((0, 0))))  # type: ignore[union-attr]
    assert pixel_digest(changed) != pixel_digest(image)


def test_encode_is_lossless_and_deterministic() -> None:
    image = noise(33, 17)
    data = encode(image)
    assert data == encode(image.copy())
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as again:
        assert again.mode == "RGB"
        assert again.tobytes() == image.tobytes()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """12 megapixels: coarse structure of 16 x 12 patches, and camera noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-12, 13, (3000, 4000, 1), dtype=np.int16)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "shorter"), [(64, 375), (128, 375), (256, 750), (512, 1500), (750, 1500), (751, 3000), (1024, 3000)]
)
def test_large_jpegs_are_decoded_at_reduced_size(photo: Image.Image, size: int, shorter: int) -> None:
    data = packed(photo, "JPEG", quality=90)
    decoded = decode_reduced(data, size)
    image = decoded.image
    assert decoded.size == (4000, 3000)
    assert min(image.size) == shorter >= 2 * size
    whole = np.asarray(to_square(decode(data), size, "center"), np.float32)
    fast = np.asarray(to_square(image, size, "center"), np.float32)
    # An odd number of pixels shifts the centre by half a pixel, which is 4 of the original.
    assert np.abs(fast - whole).mean() < (2 if shorter == 375 else 0.5)
    assert np.corrcoef(fast.ravel(), whole.ravel())[0, 1] > 0.99


def test_a_rotated_jpeg_has_the_size_of_the_upright_image(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_reduced(packed(photo, "JPEG", exif=exif), 64)
    assert decoded.size == (3000, 4000)
    assert decoded.image.size == (375, 500)


def test_other_formats_are_decoded_at_full_size(photo: Image.Image) -> None:
    small = photo.resize((400, 300))
    for kind in ("PNG", "WEBP", "BMP"):
        data = packed(small, kind)
        decoded = decode_reduced(data, 16)
        assert decoded.size == decoded.image.size == (400, 300)
        assert decoded.image.tobytes() == decode(data).tobytes()


def test_grey_and_cmyk_jpegs_are_reduced_too(photo: Image.Image) -> None:
    for mode in ("L", "CMYK"):
        image = decode_reduced(packed(photo.convert(mode), "JPEG"), 64).image
        assert (image.mode, image.size) == ("RGB", (500, 375))
