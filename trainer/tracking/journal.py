"""A file of JSON lines that outlives whoever writes it."""

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
    """Records in order, one line each, written through to the disk one by one.

    A writer that is killed leaves a whole number of lines, or a torn last one, which readers ignore and the next
    writer removes. A disk that is full stops nobody: what it does not take is kept in memory and written before the
    next record. One process writes at a time; others may read meanwhile.
    """

    def __init__(self, path: Path) -> None:
        """The file is made with the first record; its folder must exist."""
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._failing = False

    @property
    def is_behind(self) -> bool:
        """Whether there are records that the disk did not take so far."""
        return bool(self._waiting)

    def append(self, record: Record) -> None:
        """Write ``record``, plain JSON values; NaN and infinities are not among those."""
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what the disk did not take so far."""
        try:
            with self.path.open("ab+", buffering=0) as file:
                _mend(file)
                while self._waiting:
                    rest = self._waiting[0]
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                    self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                say(f"warning: {self.path} cannot be written ({error.strerror}); trying again with the next record")
            self._failing = True
        else:
            self._failing = False

    def read(self, start: int = 0) -> Iterator[tuple[Record, int]]:
        """Records from the byte ``start`` on, each with the byte at which it ends."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            end = start
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn, or being written
                end += len(line)
                yield json.loads(line), end

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Remove the other records, and a torn last line.

        Raises:
            OSError: the disk does not take the new file; the old one stays.
        """
        self._waiting = deque(line for line in self._waiting if wanted(json.loads(line)))
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record, _ in self.read() if wanted(record)]
        atomic_write(self.path, "".join(kept).encode())


def _mend(file: FileIO) -> None:
    """Cut off a torn last line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
