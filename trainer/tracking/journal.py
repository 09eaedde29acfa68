"""An append-only file of JSON records, one per line, that survives killed writers and full disks."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from catgan.command import say
from catgan.files import atomic_write

Record = dict[str, Any]


class Journal:
    """JSON records in the order they were appended, each synced to disk before ``append`` returns.

    A writer that is killed leaves complete lines, or an incomplete last line that readers ignore and the next writer
    removes. A full disk raises nothing: the records wait in memory and are written before the next one. One process may
    write at a time; others may read meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """The first record creates the file; its folder must exist."""
        self.path = path
        self._unwritten: deque[bytes] = deque()
        self._failing = False

    @property
    def has_unwritten(self) -> bool:
        """Whether records wait in memory because they could not be written."""
        return bool(self._unwritten)

    def append(self, record: Record) -> None:
        """Write ``record``, which holds plain JSON values.

        Raises:
            ValueError: it holds NaN or an infinity.
        """
        self._unwritten.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the records that wait in memory; warn once when writing starts to fail."""
        try:
            with self.path.open("ab+", buffering=0) as file:
                _remove_incomplete_line(file)
                while self._unwritten:
                    rest = self._unwritten[0]
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                    self._unwritten.popleft()
        except OSError as error:
            if not self._failing:
                say(f"warning: {self.path} cannot be written ({error.strerror}); retrying with the next record")
            self._failing = True
        else:
            self._failing = False

    def records(self) -> Iterator[Record]:
        """All records, oldest first."""
        return (record for record, _ in self.read())

    def read(self, start: int = 0) -> Iterator[tuple[Record, int]]:
        """Records from byte ``start`` on, each with the byte at which it ends."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            end = start
            for line in file:
                if not line.endswith(b"\n"):
                    return  # incomplete: being written, or left by a killed writer
                end += len(line)
                yield json.loads(line), end

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Keep the records for which ``wanted`` is true and remove all others, and an incomplete last line.

        Raises:
            OSError: the new file cannot be written; the old one stays.
        """
        self._unwritten = deque(line for line in self._unwritten if wanted(json.loads(line)))
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in self.records() if wanted(record)]
        atomic_write(self.path, "".join(kept).encode())


def _remove_incomplete_line(file: FileIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
