"""The data set on disk: WebDataset shards, and the manifest that names them.

A data set is a folder with ``train-000000.tar``..., ``val-000000.tar``..., ``manifest.json``, ``contact.png`` and,
when it was made from files, ``rejected.csv``. Each picture is a sample ``<key>.webp`` (lossless RGB, square) with
``<key>.json`` (where it came from, or how it was drawn).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from infer.command import UserError
from infer.grid import grid
from trainer.data.folder import local_path, new_folder
from trainer.data.images import encode, pixel_digest

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")

# Readers mix shards, so there should be at least four for each reader: 16 serve 2 ranks with 2 readers each. Many
# small shards cost nothing but files; large ones make the shuffle coarse and a retried download dear.
_MIN_SHARDS = 16
_MAX_IMAGES = 512
_MAX_BYTES = 64 << 20

_CONTACT_IMAGES = 64
_CONTACT_SIZE = 128


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the data set's folder, number of pictures, SHA-256 (hex) and size in bytes."""

    name: str
    images: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Split:
    """``train`` or ``val``: its shards in order. An empty split has none."""

    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. ``root`` is its folder, absolute; pictures are RGB, ``size`` x ``size``."""

    root: str
    size: int
    splits: dict[str, Split]
    seed: int
    source: tuple[str, ...]
    options: dict[str, Any]
    tool: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the size and the shards' hashes: the identity of the data set, wherever it lies."""
        hashes = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(_json([FORMAT_VERSION, self.size, hashes])).hexdigest()

    def paths(self, split: str) -> list[str]:
        """The files of a split's shards, in order."""
        return [str(Path(self.root, shard.name)) for shard in self.splits[split].shards]

    def save(self) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "size": self.size,
            "digest": self.digest,
            "splits": {
                name: {"images": split.images, "shards": [asdict(shard) for shard in split.shards]}
                for name, split in self.splits.items()
            },
            "seed": self.seed,
            "source": list(self.source),
            "options": self.options,
            "tool": self.tool,
        }
        Path(self.root, MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, location: str | Path) -> Manifest:
        """Read ``manifest.json`` in the folder ``location`` and look whether its shards are there in full length.

        Raises:
            UserError: no such folder or manifest, not a manifest of this format, or a shard is missing or cut off.
        """
        root = local_path(location).absolute()  # the manifest travels to processes that work elsewhere
        try:
            if not root.is_dir():
                raise UserError(f"no data set at {root}: make one with `catdata synth` or `catdata build`")
            record = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{root} holds no {MANIFEST}: give a folder made by `catdata build` or `synth`") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {root / MANIFEST}: {error}") from None
        found = record.get("format_version") if isinstance(record, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(
                f"{root / MANIFEST} has format_version {found!r}, this version reads {FORMAT_VERSION}: "
                "build the data set again"
            )
        try:
            manifest = _parse(str(root), record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{root / MANIFEST} is damaged ({error!r}): build the data set again") from None
        manifest._check_files()
        return manifest

    def _check_files(self) -> None:
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            path = Path(self.root, shard.name)
            if not path.is_file():
                raise UserError(f"{path} is missing: copy the data set again, or build it again")
            if (length := path.stat().st_size) != shard.bytes:
                raise UserError(f"{path} has {length} bytes instead of {shard.bytes}: copy it again, or build it again")


def _parse(root: str, record: dict[str, Any]) -> Manifest:
    splits = {}
    for name in SPLITS:
        shards = tuple(
            Shard(str(s["name"]), int(s["images"]), str(s["sha256"]), int(s["bytes"]))
            for s in record["splits"][name]["shards"]
        )
        for shard in shards:
            if not re.fullmatch(r"[\w.-]+\.tar", shard.name):
                raise ValueError(f"shard name {shard.name!r}")
        splits[name] = Split(shards)
        if splits[name].images != record["splits"][name]["images"]:
            raise ValueError(f"the images of the {name} shards do not add up")
    manifest = Manifest(
        root=root,
        size=int(record["size"]),
        splits=splits,
        seed=int(record["seed"]),
        source=tuple(record["source"]),
        options=dict(record["options"]),
        tool=str(record["tool"]),
    )
    if manifest.digest != record["digest"]:
        raise ValueError("the digest does not belong to the shards listed")
    return manifest


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


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
        text = _json(record)
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


def progress(items: Iterable[T], what: str, unit: str, total: int | None) -> Iterator[T]:
    """``items`` with a bar on stderr; where that is a log file, a line in ten seconds instead of ten in a second."""
    yield from tqdm(items, what, total, unit=f" {unit}s", mininterval=0.1 if sys.stderr.isatty() else 10.0)


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


def verify(location: str | Path) -> Manifest:
    """Read a whole data set: hashes, numbers of pictures, and that each sample is a picture of its size with JSON.

    Raises:
        UserError: the first shard that is not what the manifest says, and in what.
    """
    manifest = Manifest.load(location)
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    if strangers := sorted({path.name for path in Path(manifest.root).glob("*.tar")} - set(shards)):
        raise UserError(f"{Path(manifest.root, strangers[0])} is not in {MANIFEST}: remove it, or build again")
    keys: set[str] = set()
    for shard in progress(shards.values(), "verify", "shard", len(shards)):
        path = Path(manifest.root, shard.name)
        try:
            found = _shard_keys(path, shard, manifest.size)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{path} is damaged: {error}; copy it again, or build it again") from None
        if twice := keys.intersection(found):
            raise UserError(f"{path}: sample {min(twice)} is also in an earlier shard; build the data set again")
        keys.update(found)
    return manifest


def _shard_keys(path: Path, shard: Shard, size: int) -> list[str]:
    """The keys of a shard, after all checks. Raises ValueError, OSError or TarError with what is wrong."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError("its sha256 is not the manifest's")
    samples: dict[str, set[str]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            content = tar.extractfile(member)
            if content is None or suffix in samples.setdefault(key, set()):
                raise ValueError(f"{member.name} is no file, or is there twice")
            samples[key].add(suffix)
            try:
                _check_member(suffix, content, size)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{member.name}: {error}") from None
    for key, suffixes in samples.items():
        if suffixes not in ({"webp", "json"}, {"png", "json"}):
            raise ValueError(f"sample {key} has {', '.join(sorted(suffixes))} instead of a picture and its json")
    if len(samples) != shard.images:
        raise ValueError(f"it holds {len(samples)} pictures, the manifest says {shard.images}")
    return list(samples)


def _check_member(suffix: str, content: IO[bytes], size: int) -> None:
    if suffix == "json":
        json.load(content)
        return
    with Image.open(content, formats=("PNG", "WEBP")) as image:
        image.load()
        if (image.mode, *image.size) != ("RGB", size, size):
            raise ValueError(f"it is {image.mode} {image.width}x{image.height}, not RGB {size}x{size}")
