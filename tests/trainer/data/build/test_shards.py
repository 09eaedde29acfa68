from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from catgan.dataset import Manifest
from trainer.data.build.shards import write_shards

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


def test_checkout_that_is_not_installed_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("catgan.dataset.version", missing)
    assert write_shards(tmp_path / "set", images(2), size=SIZE).tool == "catgan"


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
