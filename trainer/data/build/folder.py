"""The folders in which data sets are made: hidden until they are complete, then renamed to their final name."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from catgan.command import UserError, say
from catgan.files import is_at
from catgan.location import resolved_path
from trainer.data.build.errors import NoUsableImageError, ResumableError
from trainer.data.build.store import STORE_FILE, holds_work

LOCK = ".lock"


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to ``out`` when the block ends and deleted when the block raises.

    It is hidden beside ``out``. What a killed process left there is deleted by the next one with the same ``out``; a
    file lock, which the system releases with the process, shows whether the process still runs.

    Raises:
        UserError: ``out`` is a file or a folder that is not empty, or cannot be written.
    """
    out = _vacant(out)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
            _remove_if_abandoned(leftover)
        folder.mkdir()
        with (folder / LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # not every network file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
            (folder / LOCK).unlink()
            folder.replace(out)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def work_folder(folder: Path, out: str | Path) -> Iterator[Path]:
    """The folder ``folder``, locked, created if it is missing, otherwise as an earlier process left it.

    It is deleted when the block ends, raises NoUsableImageError, or is stopped by an error of the user or Ctrl-C before
    its store holds any work. In all other cases, and when the process is killed, it is kept.

    Args:
        out: the data set that is made in the folder, for messages.

    Raises:
        UserError: another process uses the folder.
        ResumableError: the folder cannot be written, or the block raised an OSError or SQLite's Error.
    """
    try:
        with _locked(folder, out):
            try:
                yield folder
            except (UserError, KeyboardInterrupt) as error:
                if isinstance(error, NoUsableImageError) or not holds_work(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                elif not isinstance(error, ResumableError):  # whose message says so itself
                    say(f"the work so far is kept in {folder}: run the same command to continue")
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        raise ResumableError(f"cannot write {out}, which is made in {folder}: {error}") from error


@contextlib.contextmanager
def _locked(folder: Path, out: str | Path) -> Iterator[None]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is making {out}: wait until it is done, or stop it") from None
            except OSError:  # not every network file system has locks
                pass
            if is_at(folder / LOCK, lock.fileno()):
                yield
                return
            # The process that held the lock has deleted the folder between open and flock: try again.


def partial_folder(out: str | Path) -> Path:
    """The hidden folder beside the path ``out`` in which the data set ``out`` is made.

    Raises:
        UserError: ``out`` is a file or a folder that is not empty.
    """
    out = _vacant(out)
    return out.with_name(f".{out.name}.partial")


def _vacant(out: str | Path) -> Path:
    """``out`` as an absolute path. Raises UserError unless it is missing or an empty folder."""
    out = resolved_path(out)
    try:
        if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
            raise UserError(f"{out} exists and is not an empty folder: give another OUT, or remove it first")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return out


def publish(folder: Path, out: Path) -> None:
    """Rename a ``work_folder``, within its block, to ``out``. The store is deleted last, so no failure loses work."""
    folder.replace(out)
    for path in (*out.glob(f"{STORE_FILE}*"), out / LOCK):
        path.unlink()


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
