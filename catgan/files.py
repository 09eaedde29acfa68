"""Files that appear whole or not at all, and the folder of the cache."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from catgan.command import UserError

_PARTIAL = ".partial."


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
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """A hidden path beside ``path`` to write to, with the same suffix; it replaces ``path`` when the block ends without
    an error and is removed when it does not. Processes that write the same file at once do not disturb each other: the
    last one wins.

    Args:
        durable: fsync before the replacement, so that after a power cut ``path`` is the old or the new file.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}{_PARTIAL}{path.name}")
    try:
        yield temporary
        if durable:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` durably. Raises OSError; the old file then stays."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read that becomes ``path``, see ``atomic_path``; not synced, which many files would wait for.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_path(path, durable=False) as temporary, temporary.open("w+b") as file:
            yield file
            file.flush()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def remove_partials(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what killed processes left of files in ``folder`` for whose names ``is_ours(name)``."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        if is_ours(path.name.partition(_PARTIAL)[2]):
            path.unlink(missing_ok=True)


def is_at(path: Path, file: int) -> bool:
    """Whether the open file with descriptor ``file`` is the one that ``path`` names now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
