"""Where data sets are made: folders that appear whole or not at all."""

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
from catgan.location import local_path
from trainer.data.build.remote import Halted
from trainer.data.build.store import NAME, holds_work

LOCK = ".lock"


class Worthless(UserError):
    """A mistake that makes all work done so far useless: going on would only repeat it."""


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``out`` when the block ends, and vanishes when the block raises.

    It lies hidden beside ``out``. What a killed process left there is removed by the next one with the same ``out``; a
    lock, which the system drops with the process, tells it from the work of a process that still runs.

    Raises:
        UserError: ``out`` is a file or a folder that is not empty, or cannot be written.
    """
    out = local_path(out).resolve()
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
            raise UserError(f"{out} exists and is not an empty folder: give another OUT, or remove it first")
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
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def work_folder(folder: Path, out: str | Path) -> Iterator[Path]:
    """The folder ``folder``, locked, with all that an earlier process left in it; made if need be.

    It goes when the block ends or raises Worthless, or when there is nothing in it yet. Else it stays, whatever the
    block raises and when the process is killed.

    Args:
        out: what is made in it, for the messages.

    Raises:
        UserError: another process works in it.
        Halted: it cannot be written, or the block could not write something.
    """
    try:
        with _locked(folder, out):
            try:
                yield folder
            except (UserError, KeyboardInterrupt) as error:
                if isinstance(error, Worthless) or not holds_work(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                elif not isinstance(error, Halted):  # which says so itself
                    say(f"{folder} keeps what is done: the same command goes on from there")
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        raise Halted(f"cannot write {out}, by way of {folder}: {error}") from error


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
            # Whoever held the lock before has removed the folder in the meantime.


def partial_folder(out: str | Path) -> Path:
    """Where ``out``, a path, is made: hidden beside it.

    Raises:
        UserError: ``out`` is a file or a folder that is not empty.
    """
    out = local_path(out).resolve()
    try:
        if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
            raise UserError(f"{out} exists and is not an empty folder: give another OUT, or remove it first")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return out.with_name(f".{out.name}.partial")


def publish(folder: Path, out: Path) -> None:
    """Give a ``work_folder``, within its block, the name ``out``. The store goes last: until then nothing is lost."""
    out = out.resolve()
    folder.replace(out)
    for path in (*out.glob(f"{NAME}*"), out / LOCK):
        path.unlink()


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
