"""XMP packets and their places in files, as other programs read them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from PIL import Image

from infer.cli import main
from infer.containers import find_xmp
from infer.files import SUFFIXES, encode
from infer.origin import read_packet
from infer.provenance import MAX_PACKET, RDF, SOURCE_TYPE, Provenance, ranges, seeds_sha256
from infer.session import Generator

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
FORMATS = {".png": "png", ".jpg": "jpeg", ".webp": "webp", ".gif": "gif", ".mp4": "mp4"}

needs_exiftool = pytest.mark.skipif(
    shutil.which("exiftool") is None, reason="needs the system package libimage-exiftool-perl"
)


@pytest.fixture
def make_all(onnx_file: Path, tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Writes a sheet or walk in every format: name -> path."""

    def make(*options: str) -> dict[str, Path]:
        folder = tmp_path / "-".join(["made", *options])
        names = ("a.png", "a.jpg", "a.webp", "w.gif", "w.webp", "w.mp4")
        for name in names:
            option = "--out" if name.startswith("a") else "--interpolate"
            main(["--onnx", str(onnx_file), "--n", "3", "--device", "cpu", *options, option, str(folder / name)])
        return {name: folder / name for name in names}

    return make


def packet_in(path: Path) -> bytes | None:
    with path.open("rb") as file:
        return find_xmp(file, FORMATS[path.suffix])


def frames(path: Path) -> list[np.ndarray]:
    if path.suffix == ".mp4":
        with av.open(str(path)) as video:
            return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    with Image.open(path) as image:
        found = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            found.append(np.asarray(image.convert("RGB")))
        return found


def test_the_packet_is_rdf_with_the_properties_of_the_standards() -> None:
    packet = Provenance("sheet", "0" * 64, range(3, 8), (0.5,), labels=True, device="cpu", software='a <b> & "c" \x07')
    text = packet.packet().decode()
    assert text.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert text.endswith('<?xpacket end="w"?>')
    (description,) = ElementTree.fromstring(text).iter(f"{{{RDF}}}Description")
    assert description.get(f"{{{RDF}}}about") == ""
    assert description.get(f"{{{IPTC}}}DigitalSourceType") == SOURCE_TYPE
    assert description.get("{http://ns.adobe.com/xap/1.0/}CreatorTool") == r'a <b> & "c" \x07'


def test_equal_origins_have_equal_packets() -> None:
    packet = Provenance("image", "0" * 64, (5,), (1.0,), device="cpu").packet()
    assert packet == Provenance("image", "0" * 64, range(5, 6), [1], device="cpu").packet()
    assert len(packet) < 1000


def test_packets_of_many_images_are_those_of_each() -> None:
    origin = Provenance("image", "0" * 64, range(9), (1.0,), device="cpu")
    expected = [Provenance("image", "0" * 64, (seed,), (1.0,), device="cpu").packet() for seed in (0, 7, 2**32)]
    assert list(origin.packets((0, 7, 2**32))) == expected


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        ([5], "5"),
        (range(5, 6), "5"),
        (range(3, 9), "3-8"),
        ([3, 7, 8, 9, 1, 0, 1], "3,7-9,1,0-1"),
        (range(4, 0, -2), "4,2"),
    ],
)
def test_seeds_are_ranges_in_their_order(seeds: list[int], text: str) -> None:
    assert ranges(seeds) == text


def test_ten_thousand_seeds_in_a_row_stay_small() -> None:
    packet = Provenance("sheet", "0" * 64, list(range(7, 10_007)), (1.0,)).packet()
    assert len(packet) < 1000
    assert read_packet(packet)["seeds"] == "7-10006"


def test_scattered_seeds_that_do_not_fit_are_counted_and_hashed() -> None:
    seeds = random.Random(0).sample(range(2**32), 10_000)
    psi = [i / 7 for i in range(10_000)]
    packet = Provenance("sweep", "0" * 64, seeds, psi, labels=True, device="cuda").packet()
    assert len(packet) < 2000
    record = read_packet(packet)
    assert (record["seed_count"], record["seeds_sha256"]) == (10_000, seeds_sha256(seeds))
    assert "seeds" not in record
    assert "psi" not in record


def test_the_longest_packet_fits_into_a_jpeg(tmp_path: Path) -> None:
    seeds, psi = list(range(10**9, 10**9 + 2 * 4545, 2)), [1.23] * 2000
    packet = Provenance("sweep", "0" * 64, seeds, psi, labels=True, device="cuda", software="&" * 300).packet()
    assert MAX_PACKET - 10_000 < len(packet) <= MAX_PACKET
    assert read_packet(packet)["seed_count"] == 4545
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(np.zeros((8, 8, 3), np.uint8), ".jpg", packet))
    assert packet_in(path) == packet


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_encode_with_a_packet_has_the_pixels_of_encode_without(suffix: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    packet = Provenance("image", "0" * 64, (5,), (1.0,)).packet()
    with_packet, without = encode(pixels, suffix, packet), encode(pixels, suffix)
    if suffix == ".npy":
        assert with_packet == without
        return
    assert packet in with_packet
    paths = [tmp_path / f"{name}{suffix}" for name in ("with", "without")]
    for path, content in zip(paths, (with_packet, without), strict=True):
        path.write_bytes(content)
    np.testing.assert_array_equal(frames(paths[0]), frames(paths[1]))


def test_files_are_marked_unless_it_is_switched_off(make_all: Callable[..., dict[str, Path]], onnx_file: Path) -> None:
    marked, again, plain = make_all(), make_all("--psi", "1"), make_all("--no-metadata")
    sha256 = Generator(onnx_file, "cpu").sha256
    for name, path in marked.items():
        packet = packet_in(path)
        kind = "sheet" if name.startswith("a") else "walk"
        assert packet == Provenance(kind, sha256, range(3), (1.0,), device="cpu").packet()
        assert packet_in(plain[name]) is None
        assert b"xmp" not in plain[name].read_bytes().lower()
        if name == "w.mp4":  # x264 encodes equal frames slightly differently now and then
            assert len(frames(path)) == len(frames(plain[name])) == 60
            continue
        assert path.read_bytes() == again[name].read_bytes()
        np.testing.assert_array_equal(frames(path), frames(plain[name]))
    with Image.open(marked["w.gif"]) as gif, Image.open(plain["w.gif"]) as other:
        assert (gif.info["loop"], gif.info["duration"], gif.n_frames) == (0, 50, 60)  # type: ignore[attr-defined]
        assert gif.info["version"] == other.info["version"] == b"GIF89a"


def test_pillow_and_ffmpeg_find_the_packet(make_all: Callable[..., dict[str, Path]]) -> None:
    for name, path in make_all().items():
        packet = packet_in(path)
        assert packet
        if name == "w.mp4":
            with av.open(str(path), options={"export_xmp": "1"}) as video:
                assert video.metadata["xmp"].encode() == packet
        elif name != "w.gif":
            with Image.open(path) as image:
                assert image.info["xmp"] == packet


@needs_exiftool
def test_exiftool_reads_the_same_in_every_format(make_all: Callable[..., dict[str, Path]], onnx_file: Path) -> None:
    paths = make_all()
    command = ["exiftool", "-j", "-G1", "-validate", "-warning", *map(str, paths.values()), "-XMP:all"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    records = json.loads(done.stdout)
    assert len(records) == len(paths)
    for name, record in zip(paths, records, strict=True):
        assert record["ExifTool:Validate"] == "OK", record
        assert record["XMP-iptcExt:DigitalSourceType"] == SOURCE_TYPE
        assert record["XMP-xmp:CreatorTool"].startswith("catgan")
        assert record["XMP-catgan:GeneratorSHA256"] == Generator(onnx_file, "cpu").sha256
        assert record["XMP-catgan:Seeds"] == "0-2"
        assert record["XMP-catgan:Kind"] == ("sheet" if name.startswith("a") else "walk")


@needs_exiftool
def test_what_exiftool_rewrites_still_says_the_same(make_all: Callable[..., dict[str, Path]]) -> None:
    """exiftool writes properties as elements, at other places of the file."""
    for path in make_all().values():
        before = read_packet(packet_in(path) or b"")
        command = ["exiftool", "-q", "-overwrite_original", "-XMP-dc:Title=<A cat>", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        packet = packet_in(path)
        assert packet is not None
        assert b"&lt;A cat" in packet
        assert read_packet(packet) == before
