"""Files in the system's shared memory (``/dev/shm`` on Linux), for what the processes of one machine have in common."""

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
"""How all names there begin: ``sweep`` may remove them."""

_lock = threading.Lock()


def fence() -> None:
    """Order memory accesses between processes, also where the processor would not (Arm): who sees what is written after
    this sees what was written before. One lock's release with the next one's acquisition does that."""
    with _lock:
        pass
    with _lock:
        pass


def open_private(path: Path) -> int:
    """Open or make the file, if it is a file of this user alone: the folder is everybody's.

    Raises:
        OSError: it cannot be opened, or belongs to somebody else.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        os.close(file)
        raise PermissionError(f"{path} belongs to somebody else")
    return file


def reserve(file: int, length: int) -> None:
    """Make the file so long, with memory behind all of it: without, writing into it could end in SIGBUS.

    Raises:
        OSError: there is not so much.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, length)
    else:
        os.ftruncate(file, length)


def remove_if_unused(file: int, path: Path) -> None:
    """Close ``file``, and remove it unless another process has a lock (``flock``) on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(file)


def sweep(keep: Path) -> None:
    """Remove what killed processes left behind, but not ``keep``."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        if path != keep:
            with contextlib.suppress(OSError):
                remove_if_unused(open_private(path), path)
