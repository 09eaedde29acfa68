"""Where a run is stored: a local or shared folder, or a bucket.

Images, SQLite and ONNX files need paths, so a run in a bucket has a local copy of its files, which ``pull`` and
``push`` synchronise. Checkpoints go directly to the bucket, since another machine may need them next.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.files import atomic_write, cache_dir, remove_partials
from catgan.location import filesystem, is_url, join, resolved_path, retry
from catgan.outputs import own_files
from trainer.checkpoints import checkpoint

_RECORDS = "outbox.jsonl"
_HIDDEN = "."  # prefix of partial files and of those that concern this machine only


class Storage:
    """A run's folder on this machine.

    Attributes: ``location``, the path or URL that users see; ``work``, the local folder with the run's files.
    """

    def __init__(self, location: str | Path) -> None:
        self.work = resolved_path(location)
        self.location = str(self.work)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.location.rpartition("/")[2]

    def join(self, name: str) -> str:
        """The location of ``name`` in this folder."""
        return join(self.location, name)

    def make(self) -> None:
        """Create the folder if it does not exist.

        Raises:
            UserError: it cannot be created or written.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.remove_incomplete()
            for folder in (self.work, self.work / "best", self.work / "samples"):
                remove_partials(folder, lambda _: True)
        except OSError as error:
            raise UserError(f"cannot create {self.work} ({error.strerror}); give another --out") from error

    def checkpoints(self) -> list[str]:
        """Names of the complete checkpoints, oldest first. Raises UserError."""
        return [folder.name for folder in checkpoint.find_all(self.work)]

    def load(self, name: str) -> dict[str, Any]:
        """The state in a checkpoint. Raises UserError for a broken one, see ``checkpoint.load``."""
        return checkpoint.load(self.work / name)

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """Name and state of the latest checkpoint that is not damaged; damaged ones are skipped with a warning.

        Raises:
            UserError: all are damaged, or one cannot be read for another reason: continuing from an older one would
                overwrite it.
        """
        names = self.checkpoints()
        for older, name in zip([*names[-2::-1], None], names[::-1], strict=False):
            try:
                return name, self.load(name)
            except checkpoint.Damaged as error:
                if older is None:
                    raise UserError(f"{error}; give another --name, or remove {self.location}") from None
                say(f"warning: {error}; taking {older}, the checkpoint before, instead of {name}")
        return None

    def save(self, name: str, files: Mapping[str, bytes]) -> None:
        """Save a checkpoint atomically. Raises OSError."""
        temporary = self.work / f"{_HIDDEN}{name}-{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            for file, data in files.items():
                _write(temporary / file, data)
            shutil.rmtree(self.work / name, ignore_errors=True)
            temporary.rename(self.work / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a checkpoint. Raises OSError."""
        removed = (self.work / name).rename(self.work / f"{_HIDDEN}{name}-{uuid.uuid4().hex}")
        shutil.rmtree(removed)

    def remove_incomplete(self) -> None:
        """Delete the remains of interrupted saves and removals; only while nothing is being saved. Raises OSError."""
        for leftover in self.work.glob(f"{_HIDDEN}{checkpoint.PREFIX}*"):
            shutil.rmtree(leftover)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file in ``work`` atomically. Raises OSError."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def pull(self) -> None:
        """Download the run's files, without checkpoints, to ``work``. Raises OSError."""

    def copy(self, names: Sequence[str], scratch: Path) -> Path:
        """The run's folder on this machine to read, as it is by now, at least with the files ``names`` that exist and
        those in folders in ``names``; "" stands for all but the checkpoints. What is in a bucket is downloaded into a
        folder in ``scratch``, always the same one, since a training may be writing to ``work``, and that can have files
        of an earlier run of this name. Raises OSError."""
        return self.work

    def publish(self, folder: Path, name: str) -> None:
        """Upload the file ``name`` from a ``copy`` in ``folder``. Raises OSError."""

    def push(self) -> None:
        """Upload the run's files from ``work``. Raises OSError."""

    def set_aside(self) -> Path | None:
        """Move the local copies of a run that was deleted from its bucket into another folder, and return that; None if
        there are none. A new run of this name, also one that was begun on another machine, would take the MLflow run
        and the images of that one for its own. Nothing is deleted: there may be records that MLflow does not have yet.
        Raises OSError."""
        return None


class Bucket(Storage):
    """A run's folder in a bucket: ``path`` on ``filesystem``; ``work`` is its local copy in the cache."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.filesystem, self.path = filesystem(self.location)
        self.work = cache_dir() / "runs" / hashlib.sha256(self.location.encode()).hexdigest()[:16] / self.name
        # Exists if this machine has had files of the run in the bucket.
        self._was_there = self.work.with_name(f"{_HIDDEN}{self.name}.transferred")
        self._known: dict[str, tuple[int, int]] = {}  # size and mtime of files at the last transfer

    def make(self) -> None:
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._put(f"{_HIDDEN}writable", b"")
            self.remove_incomplete()
            for folder in (self.work, self.work / "best", self.work / "samples"):
                remove_partials(folder, lambda _: True)
        except OSError as error:
            raise UserError(f"cannot write {self.location} ({error}); give another --out") from error

    def checkpoints(self) -> list[str]:
        try:
            return sorted(name.partition("/")[0] for name in self._names() if checkpoint.is_last_file(name))
        except OSError as error:
            raise UserError(f"cannot list {self.location} ({error})") from error

    def load(self, name: str) -> dict[str, Any]:
        where = join(self.location, name)
        try:
            files = {file: self._get(f"{name}/{file}") for file in checkpoint.FILES}
        except FileNotFoundError as error:
            raise checkpoint.Damaged(f"{where} cannot be read: {error}") from error
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        return checkpoint.decode(files, where)

    def save(self, name: str, files: Mapping[str, bytes]) -> None:
        for file, data in files.items():  # in this order: the last one completes the checkpoint
            self._put(f"{name}/{file}", data)

    def remove(self, name: str) -> None:
        for file in reversed(checkpoint.FILES):
            self._remove(f"{name}/{file}")

    def remove_incomplete(self) -> None:
        names = self._names()
        whole = {name.partition("/")[0] for name in names if checkpoint.is_last_file(name)}
        for name in names:
            folder, _, file = name.partition("/")
            if file in checkpoint.FILES and folder.startswith(checkpoint.PREFIX) and folder not in whole:
                self._remove(name)

    def pull(self) -> None:
        """Local files that changed after their last transfer stay: a killed process did not upload them."""
        for name in self._names():
            here = self.work / name
            if name.startswith((_HIDDEN, checkpoint.PREFIX)) or self._is_changed(name, here):
                continue
            self.write(name, self._get(name))
            self._note_transfer(name, _stamp(here))

    def has_any(self, names: Sequence[str]) -> bool:
        """Whether one of the files ``names`` exists. Raises OSError."""
        return any(self._names(name) for name in names)

    def copy(self, names: Sequence[str], scratch: Path) -> Path:
        folder = scratch / self.work.parent.name / self.name
        for name in (found for wanted in names for found in self._names(wanted)):
            if name.startswith((_HIDDEN, checkpoint.PREFIX)):
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._get(name))
        return folder

    def publish(self, folder: Path, name: str) -> None:
        self._put(name, (folder / name).read_bytes())

    def push(self) -> None:
        # Hidden files are temporary files of other processes.
        for path in sorted(p for p in self.work.rglob("*") if not p.name.startswith(_HIDDEN) and p.is_file()):
            name = path.relative_to(self.work).as_posix()
            stamp = _stamp(path)
            if self._known.get(name) == stamp:
                continue
            self._put(name, path.read_bytes())
            self._note_transfer(name, stamp)

    def set_aside(self) -> Path | None:
        is_there = any(not name.startswith(_HIDDEN) for name in self._names())
        if not self._was_there.is_file() or (is_there and not self._is_of_another_run()):
            return None
        # What is no run's stays: the log of a trial, which is being written, and the journal of a sweep.
        names = {path.name for path in self.work.iterdir()}
        ours = own_files(names | {"config.json", _RECORDS})  # a run, though an earlier call may have moved these
        aside = self.work.with_name(f"{self.name}.deleted-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}")
        aside.mkdir(exist_ok=True)
        for name in sorted(names & ours.keys()):
            (self.work / name).rename(aside / name)
        self._was_there.unlink()
        return aside

    def _is_of_another_run(self) -> bool:
        """Whether the records here begin otherwise than those in the bucket: a run only adds to its own."""
        try:
            with (self.work / _RECORDS).open("rb") as file:
                first = file.readline()
            path = f"{self.path}/{_RECORDS}"
            return (
                first != b""
                and bytes(retry(lambda: self.filesystem.cat_file(path, start=0, end=len(first)), path)) != first
            )
        except FileNotFoundError:
            return False

    def _note_transfer(self, name: str, stamp: tuple[int, int]) -> None:
        """The file ``name`` with ``stamp`` is in the bucket."""
        if not self._known:
            self._was_there.touch()
        self._known[name] = stamp

    def _is_changed(self, name: str, here: Path) -> bool:
        """Whether the file ``here`` changed after its last transfer and is newer than the bucket's ``name``."""
        if not here.is_file() or self._known.get(name) == _stamp(here):
            return False
        path = f"{self.path}/{name}"
        return retry(lambda: self.filesystem.modified(path), path).timestamp() < here.stat().st_mtime

    def _names(self, under: str = "") -> list[str]:
        """All objects of the run, or the object ``under`` and those in the folder ``under``; relative to the run's
        folder. Without names that lead out of it, and without markers of empty folders."""
        root = f"{self.path}/{under}".rstrip("/")
        found = retry(lambda: self.filesystem.find(root), self.location)
        names = [path.removeprefix(self.path).lstrip("/") for path in found]
        return [name for name in names if ".." not in name.split("/") and not name.endswith("/") and name]

    def _get(self, name: str) -> bytes:
        path = f"{self.path}/{name}"
        return retry(lambda: self.filesystem.cat_file(path), path)

    def _remove(self, name: str) -> None:
        path = f"{self.path}/{name}"
        retry(lambda: self.filesystem.rm_file(path), path)

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self.path}/{name}"
        retry(lambda: self.filesystem.pipe_file(path, data), path, tries=3)


def open_storage(location: str | Path) -> Storage:
    """The storage of the run at a path or URL.

    Raises:
        UserError: a URL that nothing can be written to.
    """
    if not is_url(location):
        return Storage(location)
    if str(location).startswith("http"):
        raise UserError(f"{location}: nothing can be written to a web server; give a path or a bucket (s3://...)")
    return Bucket(str(location))


def load_checkpoint(location: str) -> dict[str, Any]:
    """The state in the checkpoint at a path or URL. Raises UserError."""
    folder, _, name = location.rstrip("/").rpartition("/")
    return open_storage(folder).load(name)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
