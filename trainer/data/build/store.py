"""What is known of a data set in the making: one SQLite file, so that memory does not grow and a kill costs a second.

A row is a picture looked at, kept or rejected. Rows are in the order of the sources, and those of one file are written
in one transaction, so what is in the store is always a beginning of the work.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import canonical_json

NAME = "work.sqlite"
SHOWN = 64  # rejected pictures kept of each kind, for the contact sheet

_FORMAT = 1
_COMMIT_SECONDS = 1.0
_SCHEMA = f"""
PRAGMA user_version = {_FORMAT};
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY,
    file INTEGER NOT NULL, name BLOB NOT NULL, length INTEGER NOT NULL, version TEXT NOT NULL,
    kind TEXT, reason BLOB, score REAL,
    place BLOB, width INTEGER, height INTEGER, label TEXT, signature BLOB, bytes INTEGER
);
CREATE INDEX in_order ON samples (place, id) WHERE kind IS NULL;
CREATE TABLE pictures (id INTEGER PRIMARY KEY, picture BLOB NOT NULL, record BLOB);
CREATE TABLE shards (name TEXT PRIMARY KEY, images INTEGER, sha256 TEXT, bytes INTEGER);
CREATE TABLE uploads (name TEXT PRIMARY KEY, version TEXT);
"""


@dataclass(frozen=True)
class Sample:
    """A picture ready for a shard, encoded at the data set's size.

    Attributes:
        digest: equal for pictures of which only one is to be kept; decides the place in the data set.
        width: of the original, in pixels, as ``height``.
        signature: by which near-duplicates are found: 8 bytes of perceptual hash, then the thumbnail; or nothing.
    """

    picture: bytes
    digest: bytes
    width: int
    height: int
    signature: bytes = b""


@dataclass(frozen=True)
class Rejected:
    """Why there is no sample: ``kind`` or ``kind: detail`` on one line, a number if one decided, and a small picture
    to show if it could be decoded."""

    reason: str
    score: float | None = None
    picture: bytes | None = None

    @property
    def kind(self) -> str:
        return self.reason.partition(":")[0]


@dataclass(frozen=True)
class File:
    """A file looked at: its number among all, and what tells whether it is still the same."""

    number: int
    name: str
    length: int
    version: str


def holds_work(folder: Path) -> bool:
    """Whether a store in ``folder``, which is not open, knows of any file."""
    if not (folder / NAME).is_file():
        return False
    with contextlib.closing(sqlite3.connect(folder / NAME)) as db:
        try:
            return db.execute("SELECT 1 FROM samples LIMIT 1").fetchone() is not None
        except sqlite3.DatabaseError:
            return False


class Store:
    """The work on one data set, in ``folder``. One process at a time may have it open.

    Args:
        seed: of the order of the pictures, see ``ordered``.
        pictures: whether to store pictures; without them nothing but counting is possible.
    """

    def __init__(self, folder: Path, seed: int, *, pictures: bool = True) -> None:
        self._path = folder / NAME
        self._seed, self._pictures = seed, pictures
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.clear()  # cut off by a crash of the whole machine

    def _open(self) -> None:
        # The folder has a lock of its own, and SQLite's do not work on every network file system.
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
        self._shown = collections.Counter(
            dict(
                self._db.execute(
                    "SELECT kind, count(*) FROM samples JOIN pictures USING (id) WHERE kind IS NOT NULL GROUP BY kind"
                )
            )
        )
        self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def close(self) -> None:
        """Let go of the file. What was not committed is lost."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def clear(self) -> None:
        """Forget everything, and remove from the folder what was made of it."""
        self._db.close()
        for path in self._path.parent.iterdir():
            if not path.name.startswith("."):  # the lock is
                path.unlink()
        self._open()

    def commit(self) -> None:
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")
        self._committed = time.monotonic()

    def note(self, name: str) -> Any:
        """What was noted under ``name``; None if nothing was."""
        found = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set_note(self, name: str, value: Any) -> None:
        self._db.execute("REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))
        self.commit()

    def files(self) -> Iterator[File]:
        """The files looked at, in order."""
        rows = self._db.execute("SELECT file, name, length, version FROM samples ORDER BY id")
        for _, same in itertools.groupby(rows, key=lambda row: row[0]):
            number, name, length, version = next(same)
            yield File(number, os.fsdecode(name), length, version)

    def add(
        self,
        file: File,
        results: Sequence[Sample | Rejected],
        record: Mapping[str, Any] | None = None,
        label: str | None = None,
        *,
        unique: bool = True,
    ) -> None:
        """Add all that was found in a file.

        Args:
            record: JSON for the samples; None takes name, width and height.
            label: of the samples.
            unique: whether to reject a sample with the digest of an earlier one as its duplicate.
        """
        for result in results:
            if unique and isinstance(result, Sample):
                result = self._unless_duplicate(result)
            self._insert(file, result, record, label)
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def _unless_duplicate(self, sample: Sample) -> Sample | Rejected:
        found = self._db.execute(
            "SELECT name FROM samples WHERE place = ? AND kind IS NULL", (self._place(sample),)
        ).fetchone()
        if found is None:
            return sample
        return Rejected(f"duplicate: the same pixels as {os.fsdecode(found[0])}", picture=sample.picture)

    def _place(self, sample: Sample) -> bytes:
        return hashlib.sha256(b"%d:" % self._seed + sample.digest).digest()

    def _insert(
        self, file: File, result: Sample | Rejected, record: Mapping[str, Any] | None, label: str | None
    ) -> None:
        row: tuple[Any, ...]
        if isinstance(result, Sample):
            row = (None, None, None, self._place(result), result.width, result.height, label, result.signature)
            text = canonical_json(record or {"source": file.name, "width": result.width, "height": result.height})
            shown = self._pictures
        else:
            row = (result.kind, os.fsencode(result.reason), result.score, None, None, None, None, None)
            text = None
            shown = self._pictures and result.picture is not None and self._shown[result.kind] < SHOWN
            self._shown[result.kind] += shown
        cursor = self._db.execute(
            "INSERT INTO samples VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (file.number, os.fsencode(file.name), file.length, file.version, *row, len(result.picture or b"")),
        )
        if shown:
            self._db.execute("INSERT INTO pictures VALUES (?, ?, ?)", (cursor.lastrowid, result.picture, text))

    def __len__(self) -> int:
        """Kept pictures."""
        return int(self._db.execute("SELECT count(*) FROM samples WHERE kind IS NULL").fetchone()[0])

    def rejected(self) -> collections.Counter[str]:
        """The number of rejected pictures by kind of reason."""
        rows = self._db.execute("SELECT kind, count(*) FROM samples WHERE kind IS NOT NULL GROUP BY kind ORDER BY kind")
        return collections.Counter(dict(rows))

    def rejections(self) -> Iterator[tuple[str, str, float | None]]:
        """(file, reason, score) of each rejected picture, in the order of the sources."""
        rows = self._db.execute("SELECT name, reason, score FROM samples WHERE kind IS NOT NULL ORDER BY id")
        for name, reason, score in rows:
            yield os.fsdecode(name), os.fsdecode(reason), score

    def num_files(self) -> int:
        """Files looked at."""
        return int(self._db.execute("SELECT count(DISTINCT file) FROM samples").fetchone()[0])

    def smaller_than(self, size: int) -> int:
        """Kept pictures whose original has a shorter side of fewer than ``size`` pixels."""
        return int(
            self._db.execute(
                "SELECT count(*) FROM samples WHERE kind IS NULL AND min(width, height) < ?", (size,)
            ).fetchone()[0]
        )

    def labels(self) -> list[str]:
        """The labels of kept pictures, sorted."""
        rows = self._db.execute("SELECT DISTINCT label FROM samples WHERE kind IS NULL AND label IS NOT NULL")
        return sorted(label for (label,) in rows)

    def signatures(self) -> tuple[list[int], NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint64]]:
        """Of the kept pictures: id, signature [n, bytes], pixels of the original, and a key to order equals by."""
        rows = self._db.execute("SELECT id, signature, width * height, place FROM samples WHERE kind IS NULL")
        ids, signatures, pixels, keys = [], bytearray(), [], []
        for identity, signature, area, place in rows:
            ids.append(identity)
            signatures += signature
            pixels.append(area)
            keys.append(int.from_bytes(place[:8], "big"))
        n = len(ids)
        table = np.frombuffer(signatures, np.uint8).reshape(n, len(signatures) // max(n, 1))
        return ids, table, np.array(pixels, np.int64), np.array(keys, np.uint64)

    def drop(self, identity: int, reason: str, of: int, score: float) -> None:
        """Reject a kept picture after all: ``reason`` and the name of the picture ``of`` that it resembles."""
        (name,) = self._db.execute("SELECT name FROM samples WHERE id = ?", (of,)).fetchone()
        kind = reason.partition(":")[0]
        self._db.execute(
            "UPDATE samples SET kind = ?, reason = ?, score = ? WHERE id = ?",
            (kind, os.fsencode(reason) + name, score, identity),
        )

    def bytes_between(self, start: int, stop: int) -> int:
        """The length of the encoded pictures ``start`` to ``stop`` in their final order."""
        part = "SELECT bytes FROM samples WHERE kind IS NULL ORDER BY place, id LIMIT ? OFFSET ?"
        return int(self._db.execute(f"SELECT sum(bytes) FROM ({part})", (stop - start, start)).fetchone()[0] or 0)

    def ordered(self, start: int = 0) -> Iterator[tuple[bytes, bytes, str | None]]:
        """Picture, JSON record and label of each kept picture from number ``start`` on.

        The order follows from the seed and the digests alone.
        """
        query = (
            "SELECT picture, record, label FROM samples JOIN pictures USING (id) WHERE kind IS NULL "
            "ORDER BY place, samples.id LIMIT -1 OFFSET ?"
        )
        rows: Iterator[tuple[bytes, bytes, str | None]] = self._db.execute(query, (start,))
        return rows

    def shown(self, kind: str, num: int) -> list[bytes]:
        """Up to ``num`` rejected pictures of a kind, the first ones."""
        query = "SELECT picture FROM samples JOIN pictures USING (id) WHERE kind = ? ORDER BY samples.id LIMIT ?"
        return [picture for (picture,) in self._db.execute(query, (kind, num))]

    def shard(self, name: str) -> tuple[int, str, int] | None:
        """Pictures, SHA-256 and bytes of a shard that was written."""
        found: tuple[int, str, int] | None = self._db.execute(
            "SELECT images, sha256, bytes FROM shards WHERE name = ?", (name,)
        ).fetchone()
        return found

    def set_shard(self, name: str, images: int, sha256: str, length: int) -> None:
        self._db.execute("REPLACE INTO shards VALUES (?, ?, ?, ?)", (name, images, sha256, length))
        self.commit()

    def uploads(self) -> dict[str, str | None]:
        """What was begun to be uploaded, by name; with the version the server gave it if it arrived."""
        return dict(self._db.execute("SELECT name, version FROM uploads"))

    def set_upload(self, name: str, version: str | None) -> None:
        self._db.execute("REPLACE INTO uploads VALUES (?, ?)", (name, version))
        self.commit()
