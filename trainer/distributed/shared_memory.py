"""Files in shared memory (``/dev/shm`` on Linux) that the processes of one machine map."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import threading
from pathlib import Path

FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())

PREFIX = f"catgan-{os.getuid()}-"
"""Prefix of all names there, by which ``remove_abandoned`` finds them."""

_lock = threading.Lock()


def fence() -> None:
    """A memory barrier between processes, needed on processors that reorder writes (Arm): releasing a lock and
    acquiring it orders memory accesses."""
    with _lock:
        pass
    with _lock:
        pass


def open_private(path: Path) -> int:
    """Open or create a file that belongs to this user alone, in a folder that everybody can write to.

    Returns:
        Its descriptor.

    Raises:
        OSError: it cannot be opened, or belongs to another user.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        os.close(file)
        raise PermissionError(f"{path} belongs to another user")
    return file


def reserve(file: int, length: int) -> None:
    """Extend the file to ``length`` bytes that are backed by memory; otherwise a write could end in SIGBUS.

    Raises:
        OSError: there is not enough memory.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, length)
    else:
        os.ftruncate(file, length)


def remove_if_unused(file: int, path: Path) -> None:
    """Close ``file``, and delete it unless another process has locked it (``flock``)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(file)


def remove_abandoned(keep: Path) -> None:
    """Delete the files of killed processes, but not ``keep``."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        if path != keep:
            with contextlib.suppress(OSError):
                remove_if_unused(open_private(path), path)
