"""Where data sets lie: a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from infer.command import UserError
from trainer.data.location import local_path


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
        with (folder / ".lock").open("w") as lock:
            with contextlib.suppress(OSError):  # not every network file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
            (folder / ".lock").unlink()
            folder.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
