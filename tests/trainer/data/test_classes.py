"""Classes from the shards to the batches: each image keeps its own."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from catgan.command import UserError
from catgan.dataset import MANIFEST, Manifest, Shard, Split
from tests.trainer.data.coloured import COLOURS, SIZE, seen, write_coloured
from trainer.config import LoaderConfig
from trainer.data.build.build import build
from trainer.data.build.verify import verify
from trainer.data.decoded import DecodedImages, open_decoded
from trainer.data.stream import StreamPosition, TrainStream, eval_batches


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_coloured(tmp_path_factory.mktemp("coloured") / "set")


def stream(
    manifest: Manifest, nimg: int = 0, readers: int = 0, memory_mib: int = 0, labelled: bool = True
) -> TrainStream:
    position = StreamPosition(0, 0, nimg, 4, 6, 24)
    return TrainStream(manifest, position, LoaderConfig(readers, 20, memory_mib), labelled=labelled)


def test_the_manifest_has_names_and_counts_and_stock_webdataset_reads_the_classes(coloured: Manifest) -> None:
    assert coloured.labels == COLOURS
    assert verify(coloured.root) == coloured
    found = {split: collections.Counter[int]() for split in coloured.splits}
    for split, counter in found.items():
        for sample in webdataset.WebDataset(coloured.paths(split), shardshuffle=False).decode("torchrgb"):
            assert sample["cls"] == sample["json"]["label"] == seen(sample["webp"][None]).item()
            counter[sample["cls"]] += 1
    assert {s: tuple(c[i] for i in range(3)) for s, c in found.items()} == {
        name: split.class_counts for name, split in coloured.splits.items()
    }


def test_without_classes_nothing_is_added(coloured: Manifest, tmp_path: Path) -> None:
    plain = write_coloured(tmp_path / "plain", labelled=False)
    assert not plain.is_labelled
    assert not {"labels", "class_counts"} & set((Path(plain.root) / MANIFEST).read_text().split('"'))
    with tarfile.open(plain.paths("train")[0]) as ours, tarfile.open(coloured.paths("train")[0]) as theirs:
        assert {name.rpartition(".")[2] for name in ours.getnames()} == {"webp", "json"}
        assert ours.getnames() == [name for name in theirs.getnames() if not name.endswith(".cls")]


def test_classes_of_folders(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "lime")):
        (tmp_path / "src" / name).mkdir(parents=True)
        _noise(tmp_path / "src" / name / "0.png", colour)
    manifest, _ = build([tmp_path / "src"], tmp_path / "out", size=16, labels="folder", val_fraction=0, processes=1)
    assert (manifest.labels, manifest.splits["train"].class_counts) == (("a", "b"), (1, 1))
    images, labels = next(eval_batches(verify(tmp_path / "out"), "train", labelled=True))
    assert [
        ("ab"[label], int(image.float().mean((1, 2)).argmax())) for image, label in zip(images, labels, strict=True)
    ]
    assert all(image.float().mean((1, 2)).argmax() == label for image, label in zip(images, labels, strict=True))


def _noise(path: Path, colour: str) -> None:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), colour)
    draw = ImageDraw.Draw(image)
    for i in range(0, 64, 4):
        draw.line((0, i, 64, 64 - i), "black")
    image.save(path)


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("memory", [0, 1])
def test_each_image_of_a_batch_has_its_class_in_every_epoch(coloured: Manifest, readers: int, memory: int) -> None:
    batches = stream(coloured, readers=readers, memory_mib=memory)
    for _ in range(3 * 12):
        images, labels = batches.next_labelled()
        assert labels.dtype == torch.int64
        assert torch.equal(labels, seen(images))
    batches.close()


@pytest.mark.parametrize("memory", [0, 1])
def test_the_order_is_that_without_classes_and_resuming_is_exact(coloured: Manifest, memory: int) -> None:
    whole, plain = stream(coloured, memory_mib=memory), stream(coloured, labelled=False)
    batches = [whole.next_labelled() for _ in range(14)]
    for images, _ in batches:
        assert torch.equal(images, next(plain))
    resumed = stream(coloured, nimg=4 * 9, memory_mib=memory)
    for images, labels in batches[9:]:
        again, of_again = resumed.next_labelled()
        assert torch.equal(images, again)
        assert torch.equal(labels, of_again)


def test_decoded_images_keep_their_classes_for_other_processes(coloured: Manifest) -> None:
    memory = open_decoded(coloured, 1 << 20, labelled=True)
    assert memory is not None
    pixels = torch.arange(3 * SIZE * SIZE).reshape(3, SIZE, SIZE).to(torch.uint8).numpy()
    for index in (0, 1, memory.images - 1):
        memory.put(index, pixels, 70_000 + index)
    copy: DecodedImages = pickle.loads(pickle.dumps(memory))
    assert [copy.label(index) for index in (0, 1, memory.images - 1)] == [70_000, 70_001, 70_000 + memory.images - 1]
    assert all((copy.get(index) == pixels).all() for index in (0, 1, memory.images - 1))
    assert open_decoded(coloured, 1 << 20).path != memory.path  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_each_image_with_its_class_once(coloured: Manifest, world_size: int) -> None:
    counts = collections.Counter[int]()
    for rank in range(world_size):
        for images, labels in eval_batches(coloured, "train", rank, world_size, 7, labelled=True):
            assert torch.equal(labels, seen(images))
            counts.update(labels.tolist())
    assert tuple(counts[i] for i in range(3)) == coloured.splits["train"].class_counts


def tampered(coloured: Manifest, folder: Path, change: tuple[bytes | None, bytes | None]) -> Manifest:
    """A data set whose first sample has another ``.cls`` and JSON, None: without; the shards' hashes fit."""
    folder.mkdir()
    new = {}
    for name, split in coloured.splits.items():
        shards = []
        for shard in split.shards:
            data = Path(coloured.root, shard.name).read_bytes()
            if shard.name == "train-000000.tar":
                data = _changed(data, change)
            (folder / shard.name).write_bytes(data)
            shards.append(Shard(shard.name, shard.images, hashlib.sha256(data).hexdigest(), len(data)))
        new[name] = Split(tuple(shards), split.class_counts)
    replace(coloured, root=str(folder), splits=new).save()
    return Manifest.load(folder)


def _changed(data: bytes, change: tuple[bytes | None, bytes | None]) -> bytes:
    out, is_first = io.BytesIO(), {"cls": True, "json": True}
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as tar:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            suffix = member.name.rpartition(".")[2]
            if is_first.pop(suffix, False):
                new = dict(zip(("cls", "json"), change, strict=True))[suffix]
                if new is None:
                    continue
                content = content if new == b"" else new
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    ("cls", "record", "complaint"),
    [
        (b"3", b"", r"cls: class '3', not a number from 0 to 2"),
        (b"-1", b"", r"class '-1', not a number"),
        (b"red", b"", r"class 'red', not a number"),
        (b"\xff", b"", r"class .*, not a number"),
        (None, b"", "sample 00000000 has json, webp instead of an image and its json and cls"),
        (b"", b'{"label": 7}', r"sample 00000000 has the class \d in its cls, 7 in its json"),
        (b"", b"[]", r"sample 00000000 has the class \d in its cls, None in its json"),
    ],
)
def test_verify_checks_the_class_of_each_sample(
    coloured: Manifest, tmp_path: Path, cls: bytes | None, record: bytes, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        verify(tampered(coloured, tmp_path / "set", (cls, record)).root)
    assert "\n" not in str(caught.value)


def test_verify_compares_the_counts(coloured: Manifest, tmp_path: Path) -> None:
    train = coloured.splits["train"]
    blue, green, red = train.class_counts
    forged = tampered(coloured, tmp_path / "set", (b"", b""))
    splits = {**forged.splits, "train": replace(forged.splits["train"], class_counts=(blue + 1, green, red - 1))}
    replace(forged, splits=splits).save()
    with pytest.raises(UserError, match=f"{blue + 1} train images of 'blue', the shards hold {blue}"):
        verify(forged.root)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 3], [-1, 24, 25], [49, 0, 0]])
def test_manifests_whose_counts_do_not_fit_are_refused(coloured: Manifest, tmp_path: Path, counts: list[int]) -> None:
    forged = tampered(coloured, tmp_path / "set", (b"", b""))
    record = json.loads(forged.to_json())
    record["splits"]["train"]["class_counts"] = counts
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(UserError, match="class_counts of train do not fit"):
        Manifest.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["train", "val"])
def test_manifests_with_the_counts_of_one_split_only_are_refused(coloured: Manifest, tmp_path: Path, name: str) -> None:
    forged = tampered(coloured, tmp_path / "set", (b"", b""))
    record = json.loads(forged.to_json())
    del record["splits"][name]["class_counts"]
    (tmp_path / "set" / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(UserError, match="only one of the splits has class_counts") as caught:
        Manifest.load(tmp_path / "set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [b"3", None])
def test_an_image_without_a_class_is_counted_as_unusable(coloured: Manifest, tmp_path: Path, cls: bytes | None) -> None:
    forged = replace(tampered(coloured, tmp_path / "set", (cls, b"")), max_broken=0.1)
    batches = stream(forged)
    for _ in range(24):
        images, labels = batches.next_labelled()
        assert torch.equal(labels, seen(images))
    assert batches.broken == {"train-000000.tar": 1}
    assert sum(1 for _ in itertools.islice(stream(forged, labelled=False), 24)) == 24
    with pytest.raises(UserError, match=r"1 of 48 train images .* are unusable"):
        list(eval_batches(replace(forged, max_broken=0.0), "train", labelled=True))


def test_classes_of_seeds_are_as_frequent_as_those_of_the_images() -> None:
    split = Split((), (519, 341, 0, 145, 3))
    for first, count in ((0, 2048), (12345, 1000), (2**63, 500)):
        found = collections.Counter(split.labels_of(range(first, first + count)))
        for label, images in enumerate(split.class_counts):
            assert abs(found[label] - count * images / 1008) < 3
    assert split.labels_of([7, 8]) == [*split.labels_of([7]), *split.labels_of([8])]
