"""Writing data sets: pictures in, shuffled shards with their manifest and contact sheet out."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infer.grid import grid
from trainer.data.folder import new_folder
from trainer.data.images import encode, pixel_digest
from trainer.data.manifest import SPLITS, Manifest, Shard, Split, canonical_json
from trainer.data.progress import progress

# Readers mix shards, so there should be at least four for each reader: 16 serve 2 ranks with 2 readers each. Many
# small shards cost nothing but files; large ones make the shuffle coarse and a retried download dear.
_MIN_SHARDS = 16
_MAX_IMAGES = 512
_MAX_BYTES = 64 << 20

_CONTACT_IMAGES = 64
_CONTACT_SIZE = 128


def _tool() -> str:
    try:
        return f"catgan {version('catgan')}"
    except PackageNotFoundError:  # run from a plain checkout, as a Ray job is
        return "catgan"


class ShardWriter:
    """Takes encoded pictures in any order and number, then writes them shuffled into shards.

    Encoded pictures wait in one file, so memory grows by some 200 bytes a picture, whatever the size. The order in the
    shards follows from the seed and each picture's pixels: the same pictures give the same split and order, however
    the files were packed or named.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the writer)
        self._entries: list[tuple[bytes, int, int, int]] = []  # digest, offset, bytes of picture and of record
        self._end = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, picture: bytes, digest: bytes, record: Mapping[str, Any]) -> None:
        """Add one picture, encoded by ``images.encode``, with its ``images.pixel_digest`` and the sample's JSON."""
        text = canonical_json(record)
        self._spool.write(picture + text)
        self._entries.append((digest, self._end, len(picture), len(text)))
        self._end += len(picture) + len(text)

    def finish(self, *, seed: int, val_fraction: float, source: Iterable[str], options: Mapping[str, Any]) -> Manifest:
        """Write shards, ``contact.png`` and ``manifest.json``; at least one picture must have been added.

        ``val`` gets ``val_fraction`` of the pictures, but at least one and not all if there are two or more.
        """
        assert self._entries, "no pictures"
        self._spool.flush()
        self._entries.sort(key=lambda entry: hashlib.sha256(b"%d:" % seed + entry[0]).digest())
        total = len(self._entries)
        num_val = min(max(round(total * val_fraction), 1), total - 1) if val_fraction > 0 else 0
        num_train = total - num_val
        plan = [
            *(("train", i, *part) for i, part in enumerate(self._parts(0, num_train, _MIN_SHARDS))),
            *(("val", i, *part) for i, part in enumerate(self._parts(num_train, total, 1))),
        ]
        shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        for split, i, first, last in progress(plan, "write", "shard", len(plan)):
            shards[split].append(self._write_shard(f"{split}-{i:06d}.tar", first, last))
        splits = {split: Split(tuple(written)) for split, written in shards.items()}
        self._write_contact()
        self._spool.close()
        manifest = Manifest(str(self.folder), self.size, splits, seed, tuple(source), dict(options), _tool())
        manifest.save()
        return manifest

    def _parts(self, start: int, stop: int, min_shards: int) -> Iterator[tuple[int, int]]:
        """Entries ``start`` to ``stop`` in parts for one shard each, which differ by at most one picture."""
        images = stop - start
        size = sum(entry[2] for entry in self._entries[start:stop])
        parts = min(max(min_shards, -(-images // _MAX_IMAGES), -(-size // _MAX_BYTES)), images)
        for i in range(parts):
            yield start + images * i // parts, start + images * (i + 1) // parts

    def _write_shard(self, name: str, first: int, last: int) -> Shard:
        path = self.folder / name
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(first, last):
                picture, text = self._read(index)
                for suffix, data in (("webp", picture), ("json", text)):
                    # TarInfo's defaults (time 0, no owner) keep the bytes the same on every machine and day.
                    info = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(name, last - first, sha256, path.stat().st_size)

    def _read(self, index: int) -> tuple[bytes, bytes]:
        _, offset, picture, text = self._entries[index]
        data = os.pread(self._spool.fileno(), picture + text, offset)
        return data[:picture], data[picture:]

    def _write_contact(self) -> None:
        side = min(self.size, _CONTACT_SIZE)
        pictures = []
        for index in range(min(len(self), _CONTACT_IMAGES)):
            with Image.open(io.BytesIO(self._read(index)[0])) as image:
                pictures.append(np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)))
        grid(np.stack(pictures)).save(self.folder / "contact.png")


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
        writer = ShardWriter(folder, size)
        for pixels, record in pictures:
            assert pixels.shape == (size, size, 3), pixels.shape
            assert pixels.dtype == np.uint8, pixels.dtype
            image = Image.fromarray(pixels)
            writer.add(encode(image), pixel_digest(image), record)
        writer.finish(seed=seed, val_fraction=val_fraction, source=source, options=options or {})
    return Manifest.load(out)
