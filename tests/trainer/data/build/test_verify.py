from __future__ import annotations

import hashlib
import io
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest, Shard, Split
from trainer.data.build.verify import verify

SIZE = 8


def test_verify_accepts_a_data_set(manifest: Manifest) -> None:
    assert verify(manifest.root) == manifest


def test_verify_finds_one_flipped_bit(copy: Manifest) -> None:
    shard = Path(copy.root, "train-000002.tar")
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000002\.tar is damaged.*sha256"):
        verify(copy.root)


def forge(folder: Path, members: dict[str, bytes], images: int = 1) -> Manifest:
    """A data set of one shard with these members, in ``folder``, with a manifest that matches the shard's bytes."""
    folder.mkdir()
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = path.read_bytes()
    shard = Shard(path.name, images, hashlib.sha256(data).hexdigest(), len(data))
    manifest = Manifest(str(folder), SIZE, {"train": Split((shard,)), "val": Split(())}, 0, (), {}, "")
    manifest.save()
    return manifest


def webp(size: int = SIZE, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def png_of(side: int) -> bytes:
    """A PNG whose header promises so many pixels, without any."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize(
    ("members", "images", "complaint"),
    [
        ({"a.webp": webp()}, 1, "sample a has webp instead"),
        ({"a.json": b"{}"}, 1, "sample a has json instead"),
        ({"a.webp": webp(), "a.png": webp(), "a.json": b"{}"}, 1, "sample a has json, png, webp instead"),
        ({"a.webp": webp(), "a.json": b"{}", "a.pkl": b"x"}, 1, "a.pkl: cannot identify"),
        ({"a.webp": webp(SIZE + 1), "a.json": b"{}"}, 1, "a.webp: it is RGB 9x9, not RGB 8x8"),
        ({"a.webp": webp(mode="RGBA"), "a.json": b"{}"}, 1, "a.webp: it is RGBA 8x8"),
        ({"a.webp": webp()[:20], "a.json": b"{}"}, 1, "a.webp: "),
        ({"a.webp": webp(), "a.json": b"{"}, 1, "a.json: "),
        ({"a.webp": webp(), "a.json": b"[" * 10**5}, 1, "a.json: "),
        ({"a.png": png_of(50_000), "a.json": b"{}"}, 1, "a.png: "),
        ({"a.png": png_of(9_000), "a.json": b"{}"}, 1, "a.png: it is RGB 9000x9000, not RGB 8x8"),
        ({"a.webp": webp(), "a.json": b"{}"}, 2, "holds 1 images, the manifest says 2"),
    ],
)
def test_verify_checks_each_sample(tmp_path: Path, members: dict[str, bytes], images: int, complaint: str) -> None:
    forge(tmp_path / "set", members, images)
    with pytest.raises(UserError, match=rf"train-000000\.tar is damaged: .*{complaint}"):
        verify(tmp_path / "set")


def test_verify_finds_repeated_keys(tmp_path: Path) -> None:
    first, second = (forge(tmp_path / name, {"a.webp": webp(), "a.json": b"{}"}) for name in ("set", "other"))
    shutil.copy(tmp_path / "other" / "train-000000.tar", tmp_path / "set" / "val-000000.tar")
    shard = second.splits["train"].shards[0]
    splits = {"train": first.splits["train"], "val": Split((replace(shard, name="val-000000.tar"),))}
    replace(first, splits=splits).save()
    with pytest.raises(UserError, match=r"val-000000\.tar: sample a is also in an earlier shard"):
        verify(tmp_path / "set")


def test_verify_accepts_a_forged_set_that_is_correct(tmp_path: Path) -> None:
    forge(tmp_path / "set", {"a.webp": webp(), "a.json": b"{}"})
    assert verify(tmp_path / "set").splits["train"].images == 1


def test_verify_reports_shards_that_the_manifest_does_not_list(copy: Manifest) -> None:
    shutil.copy(Path(copy.root, "train-000000.tar"), Path(copy.root, "train-000099.tar"))
    with pytest.raises(UserError, match=r"train-000099\.tar is not in manifest\.json"):
        verify(copy.root)
