"""The state of a build: one SQLite file, so that memory does not grow with the data set and a killed build continues.

A row is an image, kept or rejected. Rows are in the order of the sources, and all rows of one file are written in one
transaction: the store always holds a complete first part of the work, of which a kill costs the last second.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catgan.dataset import Shard, canonical_json
from catgan.text import printable

STORE_FILE = "work.sqlite"

MAX_PREVIEWS = 64
"""Rejected images that are stored of each kind of reason, for the contact sheet."""

_FORMAT = 2
_COMMIT_SECONDS = 1.0
_OTHER_LABEL = ", whose label is "  # in the reason of a duplicate
_SCHEMA = f"""
PRAGMA user_version = {_FORMAT};
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY,
    file INTEGER NOT NULL, name BLOB NOT NULL, length INTEGER NOT NULL, version TEXT NOT NULL,
    kind TEXT, reason BLOB, score REAL,
    place BLOB, width INTEGER, height INTEGER, label TEXT, signature BLOB, ignores_profile INTEGER, bytes INTEGER
);
CREATE INDEX in_order ON samples (place, id) WHERE kind IS NULL;
CREATE TABLE pictures (id INTEGER PRIMARY KEY, picture BLOB NOT NULL, record BLOB);
CREATE TABLE shards (name TEXT PRIMARY KEY, images INTEGER, sha256 TEXT, bytes INTEGER);
CREATE TABLE uploads (name TEXT PRIMARY KEY, version TEXT);
"""


@dataclass(frozen=True)
class File:
    """A file of the sources: its number among all of them, its name (see ``text.printable``), and what shows whether it
    has changed."""

    number: int
    name: str
    length: int
    version: str


@dataclass(frozen=True)
class Sample:
    """An image ready for a shard.

    Attributes:
        image: encoded, at the size of the data set.
        digest: equal for images of which only one is kept; decides the position in the data set.
        width: of the original, in pixels, as ``height``.
        signature: for the search for near-duplicates, see ``duplicates.signature``; empty if there is none.
        ignores_profile: the original has a colour profile that cannot be used.
    """

    image: bytes
    digest: bytes
    width: int
    height: int
    signature: bytes = b""
    ignores_profile: bool = False


@dataclass(frozen=True)
class Rejected:
    """Why there is no sample.

    Attributes:
        reason: ``kind`` or ``kind: detail``, on one line.
        score: the number that decided, if one did.
        preview: an encoded small copy of the image, if it could be decoded.
    """

    reason: str
    score: float | None = None
    preview: bytes | None = None

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


@dataclass(frozen=True)
class Signatures:
    """What the search for near-duplicates needs to know of n kept images.

    Attributes:
        rows: [n], their rows in the store.
        signatures: [n, bytes], see ``Sample``.
        pixels: [n], width times height of the originals.
        keys: [n], different for different images; decide between images of equal size.
    """

    rows: list[int]
    signatures: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    keys: NDArray[np.uint64]


def holds_work(folder: Path) -> bool:
    """Whether ``folder`` holds a store, which must not be open, with at least one file."""
    if not (folder / STORE_FILE).is_file():
        return False
    with contextlib.closing(sqlite3.connect(folder / STORE_FILE)) as db:
        try:
            return db.execute("SELECT 1 FROM samples LIMIT 1").fetchone() is not None
        except sqlite3.DatabaseError:
            return False


def _text(stored: bytes) -> str:
    """Names and reasons as they were stored; earlier versions stored those that are not UTF-8 as they are."""
    return stored.decode("utf-8", "backslashreplace")


def _other_label(label: str | None, of_kept: str | None) -> str:
    """The end of a duplicate's reason if its label is not that of the image which is kept."""
    return "" if label == of_kept else f"{_OTHER_LABEL}{of_kept}, not {label}"


class Store:
    """The state of the build in ``folder``, which is created or continued. Only one process at a time may open it.

    Args:
        seed: of the order of the images, see ``ordered``.
        images: whether to store images; without them a build can only be counted.
    """

    def __init__(self, folder: Path, seed: int, *, images: bool = True) -> None:
        self._path = folder / STORE_FILE
        self._seed, self._stores_images = seed, images
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.clear()  # damaged by a crash of the machine, or of another format

    def _open(self) -> None:
        # The folder has a lock of its own, and SQLite's locks do not work on every network file system.
        self._db = sqlite3.connect(f"{self._path.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
        self._db.execute("PRAGMA page_size = 8192")
        self._db.execute("PRAGMA journal_mode = TRUNCATE")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA cache_size = -32768")
        self._db.execute("PRAGMA temp_store = MEMORY")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if not found:
            self._db.executescript(_SCHEMA)
        elif found != _FORMAT:
            raise sqlite3.DatabaseError(f"format {found}")
        previews = "SELECT kind, count(*) FROM samples JOIN pictures USING (id) WHERE kind IS NOT NULL GROUP BY kind"
        self._num_previews = collections.Counter(dict(self._db.execute(previews)))
        self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the file. What was not committed is lost."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def clear(self) -> None:
        """Start over: empty the store, and delete everything else in its folder except hidden files."""
        self._db.close()
        for path in self._path.parent.iterdir():
            if not path.name.startswith("."):  # the lock file is hidden
                path.unlink()
        self._open()

    def commit(self) -> None:
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def note(self, name: str) -> Any:
        """The JSON value stored by ``set_note``; None if there is none."""
        found = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set_note(self, name: str, value: Any) -> None:
        self._db.execute("REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))
        self.commit()

    def files(self) -> Iterator[File]:
        """The files that were added, in order."""
        rows = self._db.execute("SELECT file, name, length, version FROM samples ORDER BY id")
        for _, of_file in itertools.groupby(rows, key=lambda row: row[0]):
            number, name, length, version = next(of_file)
            yield File(number, _text(name), length, version)

    def num_files(self) -> int:
        return int(self._db.execute("SELECT count(DISTINCT file) FROM samples").fetchone()[0])

    def add(
        self,
        file: File,
        results: Sequence[Sample | Rejected],
        record: Mapping[str, Any] | None = None,
        label: str | None = None,
        *,
        unique: bool = True,
    ) -> None:
        """Add the images of a file, at least one.

        Args:
            record: JSON of the samples; None for the name of the file and the original's width and height.
            label: of the samples.
            unique: whether to reject a sample with the digest of an earlier one as its duplicate.
        """
        for result in results:
            if unique and isinstance(result, Sample):
                result = self._unless_duplicate(result, label)
            self._insert(file, result, record, label)
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def _unless_duplicate(self, sample: Sample, label: str | None) -> Sample | Rejected:
        query = "SELECT name, label FROM samples WHERE place = ? AND kind IS NULL"
        found = self._db.execute(query, (self._sort_key(sample),)).fetchone()
        if found is None:
            return sample
        name, label_of_kept = found
        reason = f"duplicate: the same pixels as {_text(name)}{_other_label(label, label_of_kept)}"
        return Rejected(reason, preview=sample.image)

    def _sort_key(self, sample: Sample) -> bytes:
        """The column ``place``: 32 bytes that put the images in an order which only the seed and the digests decide."""
        return hashlib.sha256(b"%d:" % self._seed + sample.digest).digest()

    def _insert(
        self, file: File, result: Sample | Rejected, record: Mapping[str, Any] | None, label: str | None
    ) -> None:
        row: tuple[Any, ...]
        if isinstance(result, Sample):
            image = result.image
            row = (None, None, None, self._sort_key(result), result.width, result.height, label)
            row += (result.signature, result.ignores_profile)
            text = canonical_json(record or {"source": file.name, "width": result.width, "height": result.height})
            is_stored = self._stores_images
        else:
            image = result.preview or b""
            row = (result.kind, printable(result.reason).encode(), result.score, None, None, None, None, None, None)
            text = None
            is_stored = self._stores_images and image != b"" and self._num_previews[result.kind] < MAX_PREVIEWS
            self._num_previews[result.kind] += is_stored
        cursor = self._db.execute(
            "INSERT INTO samples VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (file.number, file.name.encode(), file.length, file.version, *row, len(image)),
        )
        if is_stored:
            self._db.execute("INSERT INTO pictures VALUES (?, ?, ?)", (cursor.lastrowid, image, text))

    def __len__(self) -> int:
        """The number of kept images."""
        return int(self._db.execute("SELECT count(*) FROM samples WHERE kind IS NULL").fetchone()[0])

    def num_smaller_than(self, size: int) -> int:
        """The number of kept images whose original has a shorter side of fewer than ``size`` pixels."""
        query = "SELECT count(*) FROM samples WHERE kind IS NULL AND min(width, height) < ?"
        return int(self._db.execute(query, (size,)).fetchone()[0])

    def num_ignored_profiles(self) -> int:
        """The number of kept images whose colour profile cannot be used."""
        query = "SELECT count(*) FROM samples WHERE kind IS NULL AND ignores_profile"
        return int(self._db.execute(query).fetchone()[0])

    def num_relabelled(self) -> int:
        """The number of duplicates and near-duplicates whose label is not that of the image which is kept."""
        query = "SELECT count(*) FROM samples WHERE kind IN ('duplicate', 'near-duplicate') AND instr(reason, ?)"
        return int(self._db.execute(query, (_OTHER_LABEL.encode(),)).fetchone()[0])

    def num_rejected(self) -> collections.Counter[str]:
        """The number of rejected images by kind of reason."""
        rows = self._db.execute("SELECT kind, count(*) FROM samples WHERE kind IS NOT NULL GROUP BY kind ORDER BY kind")
        return collections.Counter(dict(rows))

    def rejections(self) -> Iterator[tuple[str, str, float | None]]:
        """(file name, reason, score) of each rejected image, in the order of the sources."""
        rows = self._db.execute("SELECT name, reason, score FROM samples WHERE kind IS NOT NULL ORDER BY id")
        for name, reason, score in rows:
            yield _text(name), _text(reason), score

    def previews(self, kind: str, num: int) -> list[bytes]:
        """The first rejected images of a kind that have a preview, up to ``num``."""
        query = "SELECT picture FROM samples JOIN pictures USING (id) WHERE kind = ? ORDER BY samples.id LIMIT ?"
        return [image for (image,) in self._db.execute(query, (kind, num))]

    def signatures(self) -> Signatures:
        """The signatures of the kept images, in any order."""
        query = "SELECT id, signature, width * height, place FROM samples WHERE kind IS NULL"
        rows, signatures, pixels, keys = [], bytearray(), [], []
        for row, signature, area, sort_key in self._db.execute(query):
            rows.append(row)
            signatures += signature
            pixels.append(area)
            keys.append(int.from_bytes(sort_key[:8], "big"))
        n = len(rows)
        table = np.frombuffer(signatures, np.uint8).reshape(n, len(signatures) // max(n, 1))
        return Signatures(rows, table, np.array(pixels, np.int64), np.array(keys, np.uint64))

    def reject_near_duplicate(self, row: int, of: int, distance: float) -> None:
        """Reject the kept image ``row`` because it resembles the kept image ``of``."""
        (name, label_of_kept), (_, label) = (
            self._db.execute("SELECT name, label FROM samples WHERE id = ?", (each,)).fetchone() for each in (of, row)
        )
        reason = b"near-duplicate: of " + name + _other_label(label, label_of_kept).encode()
        self._db.execute(
            "UPDATE samples SET kind = ?, reason = ?, score = ? WHERE id = ?",
            ("near-duplicate", reason, distance, row),
        )

    def labels(self) -> list[str]:
        """The labels of the kept images, sorted."""
        rows = self._db.execute("SELECT DISTINCT label FROM samples WHERE kind IS NULL AND label IS NOT NULL")
        return sorted(label for (label,) in rows)

    def ordered(self, start: int = 0) -> Iterator[tuple[bytes, bytes, str | None]]:
        """(encoded image, JSON record, label) of the kept images from number ``start`` in the order of the data set.

        The order follows from the seed and the digests alone.
        """
        query = (
            "SELECT picture, record, label FROM samples JOIN pictures USING (id) WHERE kind IS NULL "
            "ORDER BY place, samples.id LIMIT -1 OFFSET ?"
        )
        rows: Iterator[tuple[bytes, bytes, str | None]] = self._db.execute(query, (start,))
        return rows

    def labels_between(self, start: int, stop: int) -> list[str | None]:
        """The labels of the kept images ``start`` to ``stop`` - 1 in the order of the data set."""
        query = "SELECT label FROM samples WHERE kind IS NULL ORDER BY place, id LIMIT ? OFFSET ?"
        return [label for (label,) in self._db.execute(query, (stop - start, start))]

    def bytes_between(self, start: int, stop: int) -> int:
        """The total length of the encoded images ``start`` to ``stop`` - 1 in the order of the data set."""
        part = "SELECT bytes FROM samples WHERE kind IS NULL ORDER BY place, id LIMIT ? OFFSET ?"
        return int(self._db.execute(f"SELECT sum(bytes) FROM ({part})", (stop - start, start)).fetchone()[0] or 0)

    def shard(self, name: str) -> Shard | None:
        """The shard of this name, if it was written."""
        found = self._db.execute("SELECT name, images, sha256, bytes FROM shards WHERE name = ?", (name,)).fetchone()
        return found and Shard(*found)

    def set_shard(self, shard: Shard) -> None:
        """Record that a shard was written."""
        self._db.execute(
            "REPLACE INTO shards VALUES (?, ?, ?, ?)", (shard.name, shard.images, shard.sha256, shard.bytes)
        )
        self.commit()

    def uploads(self) -> dict[str, str | None]:
        """The files whose upload began, by name, with the version that the server returned; None if it did not end."""
        return dict(self._db.execute("SELECT name, version FROM uploads"))

    def set_upload(self, name: str, version: str | None) -> None:
        self._db.execute("REPLACE INTO uploads VALUES (?, ?)", (name, version))
        self.commit()
