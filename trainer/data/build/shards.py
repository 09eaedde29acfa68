"""Writing data sets: pictures in, shuffled shards with their manifest and contact sheet out."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.build.folder import new_folder
from trainer.data.build.progress import progress
from trainer.data.build.sheet import IMAGES, kept_sheet
from trainer.data.build.store import NAME, File, Sample, Store
from trainer.data.images import encode, pixel_digest
from trainer.data.manifest import SPLITS, Manifest, Shard, Split, canonical_json

# Readers mix shards, so there should be at least four for each reader: 16 serve 2 ranks with 2 readers each. Many
# small shards cost nothing but files; large ones make the shuffle coarse and a retried download dear.
_MIN_SHARDS = 16
_MAX_IMAGES = 512
_MAX_BYTES = 64 << 20


def tool() -> str:
    try:
        return f"catgan {version('catgan')}"
    except PackageNotFoundError:  # run from a plain checkout, as a Ray job is
        return "catgan"


def plan(store: Store, val_fraction: float) -> list[tuple[str, int, int]]:
    """The shards for the kept pictures: file name, and numbers of the first picture and of that after the last.

    ``val`` gets ``val_fraction`` of the pictures, but at least one and not all if there are two or more.
    """
    total = len(store)
    num_val = min(max(round(total * val_fraction), 1), total - 1) if val_fraction > 0 else 0
    num_train = total - num_val
    parts = {"train": _parts(store, 0, num_train, _MIN_SHARDS), "val": _parts(store, num_train, total, 1)}
    return [(f"{split}-{i:06d}.tar", *part) for split in SPLITS for i, part in enumerate(parts[split])]


def _parts(store: Store, start: int, stop: int, min_shards: int) -> Iterator[tuple[int, int]]:
    """Pictures ``start`` to ``stop`` in parts for one shard each, which differ by at most one picture."""
    images = stop - start
    size = store.bytes_between(start, stop)
    parts = min(max(min_shards, -(-images // _MAX_IMAGES), -(-size // _MAX_BYTES)), images)
    for i in range(parts):
        yield start + images * i // parts, start + images * (i + 1) // parts


def write_data_set(
    store: Store,
    folder: Path,
    *,
    size: int,
    seed: int,
    val_fraction: float,
    source: Iterable[str],
    options: Mapping[str, Any],
) -> Manifest:
    """Write the kept pictures of ``store``, at least one, as shards, ``contact.png`` and ``manifest.json``.

    The order in the shards follows from the seed and each picture's digest: the same pictures give the same split and
    order, however the files were packed or named. Shards that the store knows as written are left as they are.
    """
    labels = store.labels()
    wanted = plan(store, val_fraction)
    done = sum(1 for _ in itertools.takewhile(lambda part: _is_written(store, folder / part[0]), wanted))
    samples = store.ordered(wanted[done][1] if done < len(wanted) else len(store))
    index = {label: i for i, label in enumerate(labels)}
    for name, first, last in progress(wanted[done:], "write", "shard", len(wanted), done):
        _write_shard(store, folder / name, itertools.islice(samples, last - first), first, index)
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for name, *_ in wanted:
        splits[name.partition("-")[0]].append(_shard(store, name))
    kept_sheet((picture for picture, *_ in itertools.islice(store.ordered(), IMAGES)), size).save(
        folder / "contact.png"
    )
    manifest = Manifest(
        root=str(folder),
        size=size,
        splits={split: Split(tuple(shards)) for split, shards in splits.items()},
        seed=seed,
        source=tuple(source),
        options=dict(options),
        tool=tool(),
        labels=tuple(labels),
    )
    manifest.save()
    return manifest


def _is_written(store: Store, path: Path) -> bool:
    shard = store.shard(path.name)
    return shard is not None and path.is_file() and path.stat().st_size == shard[2]


def _shard(store: Store, name: str) -> Shard:
    found = store.shard(name)
    assert found is not None, name
    return Shard(name, *found)


def _write_shard(
    store: Store, path: Path, samples: Iterable[tuple[bytes, bytes, str | None]], first: int, index: Mapping[str, int]
) -> None:
    number = first
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (picture, record, label) in enumerate(samples, first):
            if label is not None:
                record = canonical_json(json.loads(record) | {"label": index[label]})
            for suffix, data in (("webp", picture), ("json", record)):
                # TarInfo's defaults (time 0, no owner) keep the bytes the same on every machine and day.
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    store.set_shard(path.name, number - first + 1, sha256, path.stat().st_size)


def write_shards(
    out: str | Path,
    pictures: Iterable[tuple[np.ndarray, Mapping[str, Any]]],
    *,
    size: int,
    seed: int = 0,
    val_fraction: float = 0.1,
    source: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write pictures that are ready, uint8 ``[size, size, 3]`` each with its JSON record, as the data set ``out``.

    Raises:
        UserError: ``out`` is taken or cannot be written.
    """
    with new_folder(out) as folder:
        with Store(folder, seed) as store:
            for number, (pixels, record) in enumerate(pictures):
                assert pixels.shape == (size, size, 3), pixels.shape
                assert pixels.dtype == np.uint8, pixels.dtype
                image = Image.fromarray(pixels)
                sample = Sample(encode(image), pixel_digest(image), size, size)
                store.add(File(number, str(number), 0, ""), [sample], record, unique=False)
            write_data_set(
                store, folder, size=size, seed=seed, val_fraction=val_fraction, source=source, options=options or {}
            )
        for path in folder.glob(f"{NAME}*"):
            path.unlink()
    return Manifest.load(out)
