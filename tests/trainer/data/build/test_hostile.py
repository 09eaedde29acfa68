"""Hostile sources: none stops a build or makes it write elsewhere, and every file is kept or listed as rejected."""

from __future__ import annotations

import csv
import io
import os
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.build.build import build
from trainer.data.build.prepare import OPTIONAL_CHECKS
from trainer.data.build.verify import verify


def noise(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A decompression bomb: a small PNG whose header says 50000 x 50000 pixels, 7.5 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


JPEG = packed(noise(1, 200), "JPEG", quality=95)
GOOD = {
    "good.png": packed(noise(0), "PNG"),
    "animated.gif": packed(noise(2), "GIF", save_all=True, append_images=[noise(3), noise(4)]),
    "katze ü 猫.png": packed(noise(5), "PNG"),
    "two  spaces .png": packed(noise(6), "PNG"),
    "line\nbreak.png": packed(noise(7), "PNG"),
    "-rf.png": packed(noise(8), "PNG"),
    "no_suffix": packed(noise(9), "PNG"),
    "lies.jpg": packed(noise(10), "BMP"),
    "nonsense.tif": packed(noise(11), "TIFF", icc_profile=b"nonsense" * 99),
}
BAD = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "not readable"),
    "bomb.png": (bomb(), "too large"),
    "text.jpg": (b"meow", "not a picture"),
    "page.jpg": (b"<!DOCTYPE html><html><body>403</body></html>", "not a picture"),
    "empty.jpg": (b"", "empty file"),
    "nan.tif": (
        packed(Image.fromarray(np.full((24, 24), np.nan, np.float32)), "TIFF"),
        "not readable: pixels that are",
    ),
    "zeros.png": (bytes(5000), "not a picture"),
    'quote".jpg': (b"\xff\xd8\xff", "not"),
    "=cmd.jpg": (b"=1+1", "not a picture"),
}
FILES = GOOD | {name: data for name, (data, _) in BAD.items()}
CLIMBING = {
    "../climbs.png": packed(noise(20), "PNG"),
    "../../../climbs.png": packed(noise(21), "PNG"),
    "/absolute.png": packed(noise(22), "PNG"),
    "a/../../b.png": packed(noise(23), "PNG"),
}


def in_folder(path: Path) -> dict[str, bytes]:
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return {}


def in_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (FILES | CLIMBING).items():
            archive.writestr(name, data)
    return CLIMBING


def in_tar(path: Path) -> dict[str, bytes]:
    links = {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "device.png": tarfile.CHRTYPE}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (FILES | CLIMBING).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (links | {"pipe.png": tarfile.FIFOTYPE}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return CLIMBING


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("pack", [in_folder, in_zip, in_tar])
def test_nothing_stops_a_build_or_is_written_elsewhere(
    tmp_path: Path, pack: Callable[[Path], dict[str, bytes]], processes: int
) -> None:
    place = tmp_path / "deep" / "deeper"
    place.mkdir(parents=True)
    extra = pack(place / "src")
    before = set(tmp_path.rglob("*"))
    _, report = build([place / "src"], place / "out", size=16, processes=processes)
    verify(place / "out")
    assert report.kept == len(GOOD) + len(extra)
    with (place / "out" / "rejected.csv").open(newline="", encoding="utf-8") as file:
        reasons = {row["file"].removeprefix("src/"): row["reason"] for row in csv.DictReader(file)}
    expected = {name: kind for name, (_, kind) in BAD.items()}
    if pack is in_tar:
        expected |= {f"{name}.png": "not a file" for name in ("soft", "hard", "device", "pipe")}
    assert set(reasons) == set(expected)
    for name, kind in expected.items():
        assert reasons[name].startswith(kind), name
    assert report.read == report.kept + len(reasons)
    made = set(tmp_path.rglob("*")) - before
    assert all(path == place / "out" or path.parent == place / "out" for path in made)


def test_animation_gives_only_its_first_frame(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(GOOD["animated.gif"])
    assert build([tmp_path / "a.gif"], tmp_path / "out", size=16, processes=0)[1].read == 1


def test_folder_with_many_files(tmp_path: Path) -> None:
    num = 3000
    source = tmp_path / "src"
    source.mkdir()
    base = np.zeros((16, 16, 3), np.uint8)
    for i in range(num):
        base[0, 0] = (i >> 8, i & 255, 0)
        (source / f"{i}.ppm").write_bytes(b"P6 16 16 255\n" + base.tobytes())
    began = time.monotonic()
    report = build([source], tmp_path / "out", size=16, processes=0, keep=OPTIONAL_CHECKS)[1]
    assert (report.kept, report.rejected.total()) == (num, 0)
    assert time.monotonic() - began < 60


def test_special_characters_in_names_are_quoted_or_escaped_in_the_csv(tmp_path: Path) -> None:
    """A line of rejected.csv is a row, for readers that know of quotes and for those that do not."""
    name = b'a,"b"\nc\r\xe2\x80\xa8\x1b[2J\xff.png'  # also a line separator and a byte that is not UTF-8
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / os.fsdecode(name)).write_bytes(b"x")
    (tmp_path / "src" / "ok.png").write_bytes(GOOD["good.png"])
    build([tmp_path / "src"], tmp_path / "out", size=16, processes=0)
    text = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    escaped = r'src/a,"b"\nc\r\u2028\x1b[2J\xff.png'
    assert list(csv.reader(text.splitlines())) == [["file", "reason", "score"], [escaped, "not a picture", ""]]
