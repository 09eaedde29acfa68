from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from catgan.command import UserError
from trainer.data.build.shards import write_shards
from trainer.data.build.verify import verify
from trainer.data.manifest import Manifest, Shard, Split

SIZE = 8


def images(num: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    for i in range(num):
        yield np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), {"index": i}


def stock(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    """The samples of a split, read and decoded by stock webdataset."""
    paths = manifest.paths(split)
    return list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil")) if paths else []


def order(manifest: Manifest) -> list[int]:
    return [sample["json"]["index"] for split in ("train", "val") for sample in stock(manifest, split)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images: 45 for training, 5 for validation."""
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(out, images(50), size=SIZE, source=["noise"], options={"num": 50})
    return out


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, **changes}))


def test_stock_webdataset_reads_every_pixel_back(original: Path) -> None:
    manifest = Manifest.load(original)
    samples = stock(manifest, "train") + stock(manifest, "val")
    expected = {record["index"]: pixels for pixels, record in images(50)}
    assert len(samples) == 50
    assert len({sample["__key__"] for sample in samples}) == 50
    for sample in samples:
        np.testing.assert_array_equal(np.asarray(sample["webp"]), expected.pop(sample["json"]["index"]))


def test_files_of_a_data_set(original: Path) -> None:
    manifest = Manifest.load(original)
    shards = [Path(path).name for split in manifest.splits for path in manifest.paths(split)]
    assert shards[0] == "train-000000.tar"
    assert shards[-1] == "val-000000.tar"
    assert {path.name for path in original.iterdir()} == {*shards, "manifest.json", "contact.png"}
    with Image.open(original / "contact.png") as contact:
        assert contact.size == (8 * SIZE, 7 * SIZE)


def test_manifest_describes_the_files(original: Path) -> None:
    manifest = Manifest.load(original)
    assert (manifest.size, manifest.seed, manifest.source, manifest.options) == (SIZE, 0, ("noise",), {"num": 50})
    assert (manifest.splits["train"].images, manifest.splits["val"].images) == (45, 5)
    for name, split in manifest.splits.items():
        for shard, path in zip(split.shards, manifest.paths(name), strict=True):
            data = Path(path).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.tool.startswith("catgan ")


def test_same_seed_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    again = write_shards(tmp_path / "again", images(50), size=SIZE, source=["noise"], options={"num": 50})
    assert again.digest == Manifest.load(original).digest
    for path in original.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_order_depends_on_seed_and_images_but_not_on_their_order_in_the_source(original: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(original)
    assert sorted(order(manifest)) == list(range(50))
    assert order(manifest) != list(range(50))
    backwards = write_shards(tmp_path / "backwards", reversed(list(images(50))), size=SIZE)
    assert order(backwards) == order(manifest)
    other = write_shards(tmp_path / "other", images(50), size=SIZE, seed=1)
    assert order(other) != order(manifest)
    assert {s["json"]["index"] for s in stock(other, "val")} != {s["json"]["index"] for s in stock(manifest, "val")}
    assert other.digest != manifest.digest


@pytest.mark.parametrize(
    ("num", "fraction", "num_val"),
    [(1, 0.1, 0), (2, 0.1, 1), (2, 0.99, 1), (10, 0.0, 0), (40, 0.25, 10), (9, 0.001, 1)],
)
def test_split(tmp_path: Path, num: int, fraction: float, num_val: int) -> None:
    manifest = write_shards(tmp_path / "set", images(num), size=SIZE, val_fraction=fraction)
    assert (manifest.splits["train"].images, manifest.splits["val"].images) == (num - num_val, num_val)
    assert len(order(manifest)) == num


def test_train_shards_are_many_and_even(original: Path, tmp_path: Path) -> None:
    shards = Manifest.load(original).splits["train"].shards
    assert len(shards) == 16
    assert {shard.images for shard in shards} == {2, 3}
    few = write_shards(tmp_path / "few", images(3), size=SIZE, val_fraction=0)
    assert [shard.images for shard in few.splits["train"].shards] == [1, 1, 1]


def test_large_sets_get_more_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.build.shards._MAX_IMAGES", 2)
    by_number = write_shards(tmp_path / "number", images(50), size=SIZE).splits
    assert max(shard.images for split in by_number.values() for shard in split.shards) == 2
    monkeypatch.setattr("trainer.data.build.shards._MAX_IMAGES", 512)
    monkeypatch.setattr("trainer.data.build.shards._MAX_BYTES", 250)
    by_bytes = write_shards(tmp_path / "bytes", images(50), size=SIZE).splits
    assert len(by_bytes["train"].shards) == 45, "each image of noise takes more than 250 bytes"


def test_manifest_travels_between_processes_and_folders(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original.parent)
    manifest = pickle.loads(pickle.dumps(Manifest.load(original.name)))
    monkeypatch.chdir(tmp_path)
    assert manifest == Manifest.load(original)
    assert len(stock(manifest, "val")) == 5


def test_checkout_that_is_not_installed_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("trainer.data.build.shards.version", missing)
    assert write_shards(tmp_path / "set", images(2), size=SIZE).tool == "catgan"


def test_digest_does_not_depend_on_the_location(original: Path, copy: Path) -> None:
    assert Manifest.load(copy).digest == Manifest.load(original).digest


def test_load_without_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set at .*none"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[]", "null", '{"format_version": 1}'])
def test_load_refuses_files_that_are_no_manifest(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.load(copy)


def test_load_refuses_another_format_version(copy: Path) -> None:
    rewrite(copy, format_version=99)
    with pytest.raises(UserError, match="format_version 99, this version reads 1"):
        Manifest.load(copy)


def test_load_refuses_an_edited_manifest(copy: Path) -> None:
    record = json.loads((copy / "manifest.json").read_text())
    record["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    rewrite(copy, splits=record["splits"])
    with pytest.raises(UserError, match="digest"):
        Manifest.load(copy)


def test_load_refuses_shards_outside_the_folder(copy: Path) -> None:
    record = json.loads((copy / "manifest.json").read_text())
    record["splits"]["val"]["shards"][0]["name"] = "../copy/val-000000.tar"
    rewrite(copy, splits=record["splits"])
    with pytest.raises(UserError, match="shard name"):
        Manifest.load(copy)


def test_load_reports_missing_and_truncated_shards(copy: Path) -> None:
    shard = copy / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-000003\.tar has \d+ bytes instead of \d+"):
        Manifest.load(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar is missing"):
        Manifest.load(copy)


def test_verify_accepts_a_data_set(original: Path) -> None:
    assert verify(original) == Manifest.load(original)


def test_verify_finds_one_flipped_bit(copy: Path) -> None:
    shard = copy / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000002\.tar is damaged.*sha256"):
        verify(copy)


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


def test_verify_reports_shards_that_the_manifest_does_not_list(copy: Path) -> None:
    shutil.copy(copy / "train-000000.tar", copy / "train-000099.tar")
    with pytest.raises(UserError, match=r"train-000099\.tar is not in manifest\.json"):
        verify(copy)


def failing() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    yield from images(3)
    raise KeyboardInterrupt


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "set", failing(), size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_size_fail_an_assertion(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_shards(tmp_path / "set", images(1), size=SIZE + 1)
