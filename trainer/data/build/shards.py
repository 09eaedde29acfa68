"""Writing data sets: shuffled shards, the manifest and the contact sheet."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catgan.dataset import SPLITS, Manifest, Shard, Split, canonical_json, tool, write_shard
from trainer.data.build.folder import new_folder
from trainer.data.build.progress import progress
from trainer.data.build.sheet import IMAGES, kept_sheet
from trainer.data.build.store import STORE_FILE, File, Sample, Store
from trainer.data.images import encode, pixel_digest

# Readers mix shards, so there should be at least four for each reader: 16 are enough for 2 ranks with 2 readers each.
# Small shards cost nothing but files; large ones make the shuffle coarse and the retry of a download expensive.
_MIN_SHARDS = 16
_MAX_IMAGES = 512
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class DataSetSpec:
    """How images become a data set.

    Attributes:
        size: side of the images, in pixels.
        seed: of the order of the images, which decides the split.
        val_fraction: share of the images in the split ``val``, 0 to 1.
        source: names of the sources, for the manifest.
        options: other options, for the manifest.
    """

    size: int
    seed: int
    val_fraction: float
    source: tuple[str, ...]
    options: Mapping[str, Any]


def plan(store: Store, val_fraction: float) -> list[tuple[str, int, int]]:
    """The shards for the kept images: (file name, number of the first image, number after the last image).

    The split ``val`` gets ``val_fraction`` of the images, but at least one and, of two or more images, not all.
    """
    total = len(store)
    num_val = min(max(round(total * val_fraction), 1), total - 1) if val_fraction > 0 else 0
    num_train = total - num_val
    parts = {"train": _parts(store, 0, num_train, _MIN_SHARDS), "val": _parts(store, num_train, total, 1)}
    return [(f"{split}-{i:06d}.tar", *part) for split in SPLITS for i, part in enumerate(parts[split])]


def _parts(store: Store, start: int, stop: int, min_shards: int) -> Iterator[tuple[int, int]]:
    """Divide the images ``start`` to ``stop`` - 1 into parts of one shard each, which differ by at most one image."""
    images = stop - start
    size = store.bytes_between(start, stop)
    parts = min(max(min_shards, -(-images // _MAX_IMAGES), -(-size // _MAX_BYTES)), images)
    for i in range(parts):
        yield start + images * i // parts, start + images * (i + 1) // parts


def write_data_set(store: Store, folder: Path, spec: DataSetSpec) -> Manifest:
    """Write the kept images of ``store``, at least one, as shards, ``contact.png`` and ``manifest.json``.

    The order in the shards follows from the seed and each image's digest: the same images give the same split and
    order, whatever their files are called and wherever they come from. Shards that the store knows are not written
    again.
    """
    labels = store.labels()
    planned = plan(store, spec.val_fraction)
    done = sum(1 for _ in itertools.takewhile(lambda part: _is_written(store, folder / part[0]), planned))
    samples = store.ordered(planned[done][1] if done < len(planned) else len(store))
    label_index = {label: i for i, label in enumerate(labels)}
    for name, first, last in progress(planned[done:], "write", "shard", len(planned), done):
        shard = _write_shard(folder / name, itertools.islice(samples, last - first), first, label_index)
        store.set_shard(shard)
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for name, *_ in planned:
        written = store.shard(name)
        assert written is not None, name
        splits[name.partition("-")[0]].append(written)
    sheet = kept_sheet((image for image, *_ in itertools.islice(store.ordered(), IMAGES)), spec.size)
    sheet.save(folder / "contact.png")
    counts = {split: _class_counts(store, labels, shards) for split, shards in _image_ranges(splits).items()}
    manifest = Manifest(
        root=str(folder),
        size=spec.size,
        splits={split: Split(tuple(shards), counts[split]) for split, shards in splits.items()},
        seed=spec.seed,
        source=spec.source,
        options=dict(spec.options),
        tool=tool(),
        labels=tuple(labels),
    )
    manifest.save()
    return manifest


def _image_ranges(splits: Mapping[str, Sequence[Shard]]) -> dict[str, tuple[int, int]]:
    """The numbers of the first image of each split, and after its last."""
    sizes = [sum(shard.images for shard in shards) for shards in splits.values()]
    ends = list(itertools.accumulate(sizes))
    return {split: (end - size, end) for split, size, end in zip(splits, sizes, ends, strict=True)}


def _class_counts(store: Store, labels: Sequence[str], images: tuple[int, int]) -> tuple[int, ...]:
    """The number of images of each class among those from the first number to before the second."""
    counts = collections.Counter(store.labels_between(*images))
    return tuple(counts[label] for label in labels) if labels else ()


def _is_written(store: Store, path: Path) -> bool:
    shard = store.shard(path.name)
    return shard is not None and path.is_file() and path.stat().st_size == shard.bytes


def _write_shard(
    path: Path, samples: Iterable[tuple[bytes, bytes, str | None]], first: int, label_index: Mapping[str, int]
) -> Shard:
    """Write a shard of (encoded image, JSON record, label), whose keys are the numbers from ``first``."""

    def entries() -> Iterator[tuple[str, str, bytes, bytes, *tuple[int, ...]]]:
        for number, (image, record, label) in enumerate(samples, first):
            if label is None:
                yield f"{number:08d}", "webp", image, record
                continue
            index = label_index[label]
            record = canonical_json(json.loads(record) | {"label": index})
            yield f"{number:08d}", "webp", image, record, index

    with path.open("w+b") as file:
        return write_shard(file, path.name, entries())


def write_shards(
    out: str | Path,
    images: Iterable[tuple[np.ndarray, Mapping[str, Any]]],
    *,
    size: int,
    seed: int = 0,
    val_fraction: float = 0.1,
    source: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    label: str | None = None,
) -> Manifest:
    """Write finished images, each uint8 RGB [size, size, 3] with its JSON record, as the data set ``out``.

    Duplicates are kept. For ``seed``, ``val_fraction``, ``source`` and ``options`` see ``DataSetSpec``. ``label`` is
    the entry of the records that is the class of an image; None: there are no classes.

    Raises:
        UserError: ``out`` is not empty, or cannot be written.
    """
    with new_folder(out) as folder:
        with Store(folder, seed) as store:
            for number, (pixels, record) in enumerate(images):
                assert pixels.shape == (size, size, 3), pixels.shape
                assert pixels.dtype == np.uint8, pixels.dtype
                image = Image.fromarray(pixels)
                sample = Sample(encode(image), pixel_digest(image), size, size)
                name = None if label is None else str(record[label])
                store.add(File(number, str(number), 0, ""), [sample], record, name, unique=False)
            write_data_set(store, folder, DataSetSpec(size, seed, val_fraction, tuple(source), options or {}))
        for path in folder.glob(f"{STORE_FILE}*"):
            path.unlink()
    return Manifest.load(out)
