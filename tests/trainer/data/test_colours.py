"""Images are decoded to sRGB, whatever colours their files declare."""

from __future__ import annotations

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.trainer.data import profiles
from trainer.data.cli import main
from trainer.data.colours import MAX_PROFILE
from trainer.data.images import decode, decode_reduced, to_rgb

WIDE = {"Display P3": profiles.DISPLAY_P3, "Adobe RGB": profiles.ADOBE_RGB, "swapped": profiles.SWAPPED}
P3_POINTS = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def motif(seed: int = 0) -> Image.Image:
    """Soft patches of colours that all the spaces here have."""
    patches = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((48, 48), Image.Resampling.BILINEAR)


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    elif kind in ("JPEG", "AVIF"):
        options |= {"quality": 100, "subsampling": "4:4:4"}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(one: Image.Image, other: Image.Image) -> int:
    assert one.mode == other.mode == "RGB"
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def ignores(data: bytes) -> bool:
    return decode_reduced(data, None).ignores_profile


@pytest.mark.parametrize("space", WIDE)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_photo_looks_the_same_in_every_space(kind: str, space: str) -> None:
    photo = motif()
    stored = profiles.expressed_in(WIDE[space], photo)
    assert difference(stored, photo) > 20
    data = packed(stored, kind, icc_profile=WIDE[space])
    assert difference(decode(data), photo) <= (6 if kind in ("JPEG", "AVIF") else 2)
    assert not ignores(data)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_other_modes_of_rgb_are_converted_too(mode: str) -> None:
    stored = motif().convert(mode)
    plain = decode(packed(stored, "PNG"))
    converted = decode(packed(stored, "PNG", icc_profile=profiles.SWAPPED))
    assert difference(converted, Image.merge("RGB", plain.split()[::-1])) <= 3


def test_transparent_pixels_become_white_after_the_conversion() -> None:
    """White of the display, not of the profile, and blended in sRGB."""
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    image.putpixel((1, 0), (200, 100, 50, 128))
    (hole, half), *_ = np.asarray(decode(packed(image, "PNG", icc_profile=profiles.SWAPPED))).tolist()
    assert hole == [255, 255, 255]
    assert np.abs(np.array(half) - (152, 177, 228)).max() <= 3


def versions_of_srgb() -> dict[str, bytes]:
    """As others write it: with a table instead of a formula, and with rounded primaries."""
    curve = [round((v / 1023 / 12.92 if v < 41 else ((v / 1023 + 0.055) / 1.055) ** 2.4) * 65535) for v in range(1024)]
    tags = profiles.tags_of(profiles.SRGB)
    table = struct.pack(">4s4xI1024H", b"curv", 1024, *curve)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table)
    rounded = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    return {
        "formula": profiles.SRGB,
        "table": profiles.made_of(tags, b"RGB "),
        "rounded": profiles.like_srgb(rounded),
    }


@pytest.mark.parametrize("version", versions_of_srgb())
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_srgb_keeps_every_pixel(mode: str, version: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert(mode)
    data = packed(image, "PNG", icc_profile=versions_of_srgb()[version])
    assert decode(data).tobytes() == decode(packed(image, "PNG")).tobytes()
    assert not ignores(data)


def ramp() -> Image.Image:
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def as_srgb(gamma: float) -> np.ndarray:
    """The sRGB levels of the grey levels of a space with this gamma."""
    linear = np.linspace(0, 1, 256) ** gamma
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("stored", ["L", "LA", "I;16", "16-bit LA", "RGB of equal channels"])
def test_grey_profiles(stored: str, gamma: float) -> None:
    grey = ramp()
    if stored == "I;16":
        grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif stored == "16-bit LA":  # which Pillow reads as RGBA
        grey = Image.merge("RGBA", [grey] * 3 + [Image.new("L", grey.size, 255)])
    else:
        grey = grey.convert(stored[:3].strip())
    image = decode(packed(grey, "PNG", icc_profile=profiles.grey(gamma)))
    pixels = np.asarray(image, float)
    assert np.ptp(pixels, axis=-1).max() == 0
    assert np.abs(pixels[0, :, 0] - as_srgb(gamma)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    options: dict[str, Any] = {"quality": 100} if kind == "JPEG" else {}
    for options_of_profile, expected in (({}, (0, 255, 255)), ({"icc_profile": profiles.inks()}, (255, 255, 0))):
        buffer = io.BytesIO()
        cyan.save(buffer, kind, **options, **options_of_profile)
        decoded = decode_reduced(buffer.getvalue(), 8)
        assert np.abs(np.asarray(decoded.image, int) - expected).max() <= 6
        assert not decoded.ignores_profile


UNUSABLE = {
    "text": b"not a profile at all" * 8,
    "shorter than a header": profiles.DISPLAY_P3[:20],
    "cut off in the table of tags": profiles.DISPLAY_P3[:150],
    "cut off in the primaries": profiles.DISPLAY_P3[: len(profiles.DISPLAY_P3) // 2],
    "without tags": profiles.made_of({}, b"RGB "),
    "with more tags than bytes": profiles.made_of({}, b"RGB ", declared=0xFFFFFFFF),
    "of a link between devices": profiles.made_of(profiles.tags_of(profiles.DISPLAY_P3), b"RGB ", b"link"),
    "larger than the limit": profiles.DISPLAY_P3 + bytes(MAX_PROFILE),
    "of inks": profiles.inks(),
    "of greys": profiles.grey(1.8),
    "of Lab": profiles.made_of(profiles.tags_of(profiles.DISPLAY_P3), b"Lab ", b"spac"),
}


@pytest.mark.parametrize("problem", UNUSABLE)
@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_a_profile_that_cannot_be_used_leaves_the_pixels(kind: str, problem: str) -> None:
    data = packed(motif(), kind, icc_profile=UNUSABLE[problem])
    began = time.process_time()
    assert decode(data).tobytes() == motif().tobytes()
    assert ignores(data)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("profile", [profiles.DISPLAY_P3, profiles.grey(1.8)])
def test_a_profile_of_another_space_leaves_inks(profile: bytes) -> None:
    data = packed(motif().convert("CMYK"), "TIFF", icc_profile=profile)
    assert decode(data).tobytes() == motif().convert("CMYK").convert("RGB").tobytes()
    assert ignores(data)


def test_lab() -> None:
    lab = motif().convert("LAB")  # with a profile that says so
    assert lab.info["icc_profile"]
    assert difference(decode(packed(lab, "TIFF")), motif()) <= 10  # 8 bits of Lab are coarse
    assert not ignores(packed(lab, "TIFF"))
    assert ignores(packed(lab, "TIFF", icc_profile=profiles.DISPLAY_P3))


def test_incomplete_profile_of_a_jpeg() -> None:
    data = packed(motif(), "JPEG", icc_profile=profiles.DISPLAY_P3 + bytes(70_000))  # two segments
    second = data.index(b"ICC_PROFILE\0\x02\x02")
    cut = data.replace(data[second - 4 : second + 4464], b"")
    assert decode(cut).tobytes() == decode(packed(motif(), "JPEG")).tobytes()
    assert ignores(cut)


@pytest.mark.parametrize("segment", [b"", b"\1", b"\0\0", b"\2\1profile"])
def test_damaged_segment_of_a_jpeg(segment: bytes) -> None:
    plain = packed(motif(), "JPEG")
    body = b"ICC_PROFILE\0" + segment
    data = plain[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(body)) + body + plain[2:]
    assert decode(data).tobytes() == decode(plain).tobytes()
    assert ignores(data)


@pytest.mark.parametrize("value", ["a profile", (1, 2, 3), 7])
def test_a_profile_of_another_type_in_a_tiff(value: Any) -> None:
    image = motif()
    image.info["icc_profile"] = value
    rgb, uses_profile = to_rgb(image)
    assert not uses_profile
    assert rgb.tobytes() == motif().tobytes()


def test_programs_without_end_are_not_run() -> None:
    data = packed(profiles.expressed_in(profiles.DISPLAY_P3, motif()), "PNG", icc_profile=profiles.endless())
    began = time.process_time()
    assert difference(decode(data), motif()) <= 2
    assert time.process_time() - began < 5


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(image: Image.Image, *chunks: bytes) -> bytes:
    data = packed(image, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def gamma_chunk(gamma: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))


def points_chunk(points: tuple[float, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(x * 100_000) for x in points)))


def test_chunks_of_png_that_mean_srgb_keep_every_pixel() -> None:
    srgb = points_chunk((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))
    for chunks in (
        [gamma_chunk(0.45455)],
        [gamma_chunk(0.45455), srgb],
        [srgb],
        [chunk(b"sRGB", b"\0"), gamma_chunk(1)],
    ):
        data = png_with(motif(), *chunks)
        assert decode(data).tobytes() == motif().tobytes()
        assert not ignores(data)


def test_primaries_and_gamma_of_a_png() -> None:
    stored = profiles.expressed_in(profiles.DISPLAY_P3, motif())
    assert difference(decode(png_with(stored, gamma_chunk(0.45455), points_chunk(P3_POINTS))), motif()) <= 2
    linear = decode(png_with(ramp(), gamma_chunk(1.0)))
    assert np.abs(np.asarray(linear, float)[0, :, 0] - as_srgb(1.0)).max() <= 1


@pytest.mark.parametrize(
    "chunks",
    [
        gamma_chunk(0),
        gamma_chunk(40),
        chunk(b"gAMA", b"\0"),
        points_chunk((0,) * 8),
        points_chunk((0.3127, 0.329) * 4),
        chunk(b"cHRM", b"\xff" * 32),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"name\0\7of another method"),
        chunk(b"iCCP", b"name\0\0not compressed"),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(50 << 20))),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(profiles.SRGB))[:-4] + b"\0\0\0\0",
    ],
    ids=lambda chunks: chunks[4:8].decode(),
)
def test_damaged_chunks_of_a_png_leave_the_pixels(chunks: bytes) -> None:
    data = png_with(motif(), chunks)
    assert decode(data).tobytes() == motif().tobytes()
    assert ignores(data)


@pytest.mark.parametrize(("transfer", "is_used"), [(13, True), (16, False)])
def test_code_points_of_heif(transfer: int, is_used: bool) -> None:
    """As pillow-heif gives them; 16 is a curve for high dynamic range."""
    image = profiles.expressed_in(profiles.DISPLAY_P3, motif())
    nclx: dict[str, float] = {"color_primaries": 12, "transfer_characteristics": transfer}
    names = [f"color_primary_{name}_{axis}" for name in ("white", "red", "green", "blue") for axis in "xy"]
    image.info = {"nclx_profile": nclx | dict(zip(names, P3_POINTS, strict=True))}
    rgb, uses_profile = to_rgb(image)
    assert uses_profile == is_used
    assert (difference(rgb, motif()) <= 2) == is_used


def test_code_points_that_say_nothing() -> None:
    image = motif()
    image.info = {"nclx_profile": {"color_primaries": 2, "transfer_characteristics": 2}}
    rgb, uses_profile = to_rgb(image)
    assert rgb.tobytes() == motif().tobytes()
    assert uses_profile


def test_a_decoded_image_does_not_claim_the_colours_of_its_file() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = packed(motif(), "JPEG", icc_profile=profiles.SWAPPED, exif=exif)
    assert decode(data).info == {}
    assert not decode(data).getexif()


def test_threads_share_the_conversions() -> None:
    data = {space: packed(motif(), "PNG", icc_profile=profile) for space, profile in WIDE.items()}
    alone = {space: decode(of_space).tobytes() for space, of_space in data.items()}
    with ThreadPoolExecutor(8) as threads:
        turns = list(data) * 40
        assert list(threads.map(lambda space: decode(data[space]).tobytes(), turns)) == [alone[s] for s in turns]


def test_builds_convert_and_count_what_they_cannot_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for seed, (name, profile) in enumerate({"swapped": profiles.SWAPPED, "broken": b"nonsense" * 9}.items()):
        (source / f"{name}.png").write_bytes(packed(motif(seed), "PNG", icc_profile=profile))
    out = tmp_path / "out"
    options = ["--size", "48", "--val-fraction", "0", "--keep", "blurred,near-duplicate,flat", "--processes", "1"]
    result = main(["build", str(source), str(out), *options])
    assert (result["kept"], result["ignored_profiles"]) == (2, 1)
    assert "colour profiles: 1 cannot be used" in capsys.readouterr().err
    with Image.open(out / "contact.png") as sheet:
        shown = [sheet.crop((48 * i, 0, 48 * i + 48, 48)).convert("RGB") for i in range(2)]
    swapped = Image.merge("RGB", motif(0).split()[::-1])
    assert sorted(min(difference(tile, swapped), difference(tile, motif(1))) for tile in shown)[-1] <= 3


def test_reference_of_these_tests() -> None:
    """Little CMS itself converts the profiles made here as they are meant."""
    yellow = ImageCms.profileToProfile(
        Image.new("CMYK", (1, 1), (255, 0, 0, 0)),
        io.BytesIO(profiles.inks()),
        io.BytesIO(profiles.SRGB),
        outputMode="RGB",
    )
    assert yellow is not None
    assert np.abs(np.array(yellow.getpixel((0, 0))) - (255, 255, 0)).max() <= 6
