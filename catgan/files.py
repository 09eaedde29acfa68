"""Atomic writes, and the cache folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from catgan.command import UserError
from catgan.location import local_path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial."


def cache_path() -> Path:
    """This project's cache folder: CATGAN_CACHE, else XDG_CACHE_HOME/catgan, else ~/.cache/catgan."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return local_path(os.environ.get("CATGAN_CACHE") or Path(root, "catgan"))


def cache_dir() -> Path:
    """``cache_path()``, made if missing.

    Raises:
        UserError: it cannot be made or is not writable.
    """
    folder = cache_path()
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
    """A hidden temporary path in the folder of ``path``, with the same suffix, for the block to write a file to.

    The file replaces ``path`` at the end of the block, or is removed if the block raises. If processes write the same
    file at once, the last one wins.

    Args:
        durable: fsync before the replacement, so that after a power failure ``path`` is the old or the new file.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}{_PARTIAL}{path.name}")
    try:
        yield temporary
        if durable:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # which would hide why writing failed
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace ``path`` by a file with ``data``, see ``atomic_path``. Raises OSError, which leaves the old file
    unchanged."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_open(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """An open file for writing and reading that replaces ``path``, see ``atomic_path``. By default without fsync, which
    would slow down writing many files.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_path(path, durable) as temporary, temporary.open("w+b") as file:
            yield file
            file.flush()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """A block that one process at a time runs for ``folder``. There is no lock on Windows, and on file systems without
    locks for folders.

    Raises:
        UserError: another process is in such a block.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is writing there: wait for it, or choose another folder") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def remove_partials(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove the temporary files of killed processes in ``folder``, if ``is_ours`` is true for the final name."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        if is_ours(path.name.partition(_PARTIAL)[2]):
            path.unlink(missing_ok=True)


def is_at(path: Path, file: int) -> bool:
    """Whether ``path`` is still the open file with the descriptor ``file``, and not removed or replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
