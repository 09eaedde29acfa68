"""Files that are dear to make and may be lost at any time: exported networks, statistics of real pictures."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infer.command import UserError


def cache_dir() -> Path:
    """The folder of this project's cache: CATGAN_CACHE, else XDG_CACHE_HOME/catgan, else ~/.cache/catgan.

    Raises:
        UserError: it cannot be made or written.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CATGAN_CACHE") or Path(root, "catgan"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder} ({error.strerror}): set CATGAN_CACHE to another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write in the cache folder {folder}: set CATGAN_CACHE to another")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error, and what
    was written is on the disk.

    Processes that make the same file at once each write their own, and the last one stays.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
