"""The format of data sets, which ``catdata`` and ``catinfer`` write: WebDataset shards and their manifest.

A data set is a folder with ``train-000000.tar``..., ``val-000000.tar``..., ``manifest.json``, ``contact.png`` and,
if it was built from files, ``rejected.csv``. Each sample is an image ``<key>.webp`` or ``<key>.png`` (lossless RGB,
square) with ``<key>.json`` (its source, or the attributes of a drawn cat) and, if the images have classes,
``<key>.cls`` (the number of its class, as text, which webdataset decodes to an int).
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from catgan.command import UserError
from catgan.location import is_url, join, local_path, read
from catgan.text import to_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fraction, times 2^64


@dataclass(frozen=True)
class Shard:
    """A tar file: its name in the data set's folder, number of images, SHA-256 (hex) and size in bytes."""

    name: str
    images: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Split:
    """The shards of ``train`` or ``val``, in order; none if the split is empty."""

    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...] = ()
    """Number of images of each class; empty if the images have no classes."""

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    def labels_of(self, seeds: Iterable[int]) -> list[int]:
        """A class for the generated image of each seed, 0 or more: among consecutive seeds the classes are as frequent
        as among the images of the split, to within two images or so.

        The multiples of the golden ratio spread evenly over [0, 1), of which each class has its share.
        """
        ends = list(itertools.accumulate(self.class_counts))
        return [bisect.bisect_right(ends, (seed * _GOLDEN_RATIO % 2**64) * ends[-1] >> 64) for seed in seeds]


@dataclass(frozen=True)
class Manifest:
    """The contents of a data set, and how to read it."""

    root: str
    """The data set's folder: an absolute path or a URL."""
    size: int
    """Side of the images in pixels."""
    splits: dict[str, Split]
    seed: int
    """Seed of the shuffle, and of drawn cats."""
    source: tuple[str, ...]
    """What the data set was made from."""
    options: dict[str, Any]
    """The options it was made with."""
    tool: str
    """Name and version of the program that wrote it."""
    cache: str = ""
    """Local folder to cache the shards of a URL in; "": no cache. Not in the file."""
    max_broken: float = 0.01
    """Share of a split's images that may be unusable, 0 to 1, see ``stream``. Not in the file."""
    labels: tuple[str, ...] = ()
    """Names of the classes; ``<key>.cls`` and "label" in a sample's JSON are an index into them. Empty: no classes."""

    @property
    def is_labelled(self) -> bool:
        """Whether each sample has a ``<key>.cls``. Data sets with ``labels`` of earlier versions have "label" only."""
        return any(split.class_counts for split in self.splits.values())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the image size and the shards' hashes: identifies the data set, whatever its location."""
        hashes = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(canonical_json([FORMAT_VERSION, self.size, hashes])).hexdigest()

    def paths(self, split: str) -> list[str]:
        """Paths or URLs of a split's shards, in order."""
        return [join(self.root, shard.name) for shard in self.splits[split].shards]

    def save(self) -> None:
        """Write ``manifest.json`` into ``root``, a local folder."""
        Path(self.root, MANIFEST).write_bytes(self.to_json())

    def to_json(self) -> bytes:
        """The content of ``manifest.json``."""
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "size": self.size,
            "digest": self.digest,
            "splits": {
                name: {
                    "images": split.images,
                    "shards": [asdict(shard) for shard in split.shards],
                    **({"class_counts": list(split.class_counts)} if split.class_counts else {}),
                }
                for name, split in self.splits.items()
            },
            "seed": self.seed,
            "source": list(self.source),
            "options": self.options,
            "tool": self.tool,
        }
        if self.labels:
            record["labels"] = list(self.labels)
        return (to_json(record, indent=2) + "\n").encode()

    @classmethod
    def load(cls, location: str | Path) -> Manifest:
        """Read ``manifest.json`` in the folder ``location``, and check the sizes of local shards.

        Raises:
            UserError: there is no such folder or manifest, the manifest is damaged or of another format version, or a
                local shard is missing or has another size.
        """
        # Absolute: the manifest is sent to processes with other working directories.
        root = str(location).rstrip("/") if is_url(location) else str(local_path(location).absolute())
        path = join(root, MANIFEST)
        if is_url(root) and ("?" in root or "#" in root):
            raise UserError(f"{root}: give the URL of the folder with {MANIFEST} and the shards, without ? and #")
        try:
            record = json.loads(read(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no data set at {root}: it holds no {MANIFEST}; `catdata build` makes one") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        found = record.get("format_version") if isinstance(record, dict) else None
        if found != FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {found!r}, this version reads {FORMAT_VERSION}: build the data set again"
            )
        try:
            manifest = _parse(root, record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error!r}): build the data set again") from None
        if not is_url(root):
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
    labels = tuple(map(str, record.get("labels", ())))
    for name in SPLITS:
        shards = tuple(
            Shard(str(s["name"]), int(s["images"]), str(s["sha256"]), int(s["bytes"]))
            for s in record["splits"][name]["shards"]
        )
        for shard in shards:
            if not re.fullmatch(r"[\w.-]+\.tar", shard.name):
                raise ValueError(f"shard name {shard.name!r}")
        counts = tuple(map(int, record["splits"][name].get("class_counts", ())))
        splits[name] = Split(shards, counts)
        if splits[name].images != record["splits"][name]["images"]:
            raise ValueError(f"the images of the {name} shards do not add up")
        if counts and (len(counts) != len(labels) or min(counts) < 0 or sum(counts) != splits[name].images):
            raise ValueError(f"the class_counts of {name} do not fit the classes or the number of images")
    if len({bool(split.class_counts) for split in splits.values()}) > 1:
        raise ValueError("only one of the splits has class_counts")
    manifest = Manifest(
        root=root,
        size=int(record["size"]),
        splits=splits,
        seed=int(record["seed"]),
        source=tuple(record["source"]),
        options=dict(record["options"]),
        tool=str(record["tool"]),
        labels=labels,
    )
    if manifest.digest != record["digest"]:
        raise ValueError("the digest does not belong to the shards listed")
    return manifest


def write_shard(file: BinaryIO, name: str, samples: Iterable[tuple[str, str, bytes, bytes, *tuple[int, ...]]]) -> Shard:
    """Write a shard into ``file``, which is open for writing and reading. Equal samples give equal bytes.

    Args:
        name: file name of the shard.
        samples: (key, suffix of the image, encoded image, JSON record), then the number of the class if there is one.
    """
    images = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, suffix, image, record, *label in samples:
            labels = [("cls", str(number).encode()) for number in label]
            for end, content in ((suffix, image), ("json", record), *labels):
                # TarInfo's defaults (time 0, no owner) keep the bytes the same on every machine and day.
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            images += 1
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return Shard(name, images, digest.hexdigest(), file.tell())


def tool() -> str:
    """Name and version of this program, for the manifest."""
    try:
        return f"catgan {version('catgan')}"
    except PackageNotFoundError:  # a checkout that is not installed, as in a Ray job
        return "catgan"


def canonical_json(value: Any) -> bytes:
    """JSON without spaces and with sorted keys: equal values give equal bytes."""
    return to_json(value, sort_keys=True, separators=(",", ":")).encode()
