"""Where a run lies: in a folder of this machine or of a disk that the nodes share, or in a bucket.

What makes pictures, databases and ONNX files wants paths, so a run in a bucket has a copy of its files on the machine
that works on them; ``pull`` and ``push`` keep the two in step. Checkpoints go straight to the bucket, since the next
machine that needs one may be another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.files import atomic_write, cache_dir
from catgan.location import filesystem, is_url, join, retry
from trainer.checkpoints import checkpoint

_HIDDEN = "."  # what begins with it is half-written, or concerns this machine only


class Storage:
    """A run's folder on this machine.

    Attributes: ``location``, by which users know it; ``work``, the folder with the run's files.
    """

    def __init__(self, location: str | Path) -> None:
        self.work = Path(location).expanduser().resolve()
        self.location = str(self.work)

    @property
    def name(self) -> str:
        """The run's."""
        return self.location.rpartition("/")[2]

    def join(self, name: str) -> str:
        """The location of ``name`` in this folder."""
        return join(self.location, name)

    def make(self) -> None:
        """Make the folder if need be.

        Raises:
            UserError: it cannot be made or written.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.sweep()
        except OSError as error:
            raise UserError(f"cannot make {self.work} ({error.strerror}); give another --out") from error

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that were written to their end, oldest first. Raises UserError."""
        return [folder.name for folder in checkpoint.find_all(self.work)]

    def load(self, name: str) -> dict[str, Any]:
        """The state in a checkpoint. Raises UserError for a broken one, see ``checkpoint.load``."""
        return checkpoint.load(self.work / name)

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """Name and state of the newest checkpoint that is not damaged; those that are, are passed over in words.

        Raises:
            UserError: all are damaged, or one cannot be read for another reason. An older one would do for now, but
                what follows it would replace the newer one.
        """
        names = self.checkpoints()
        for older, name in zip([*names[-2::-1], None], names[::-1], strict=False):
            try:
                return name, self.load(name)
            except checkpoint.Damaged as error:
                if older is None:
                    raise
                say(f"warning: {error}; taking {older}, the checkpoint before, instead of {name}")
        return None

    def save(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keep a checkpoint, all of it or nothing. Raises OSError."""
        beside = self.work / f"{_HIDDEN}{name}-{uuid.uuid4().hex}"
        try:
            beside.mkdir(parents=True)
            for file, data in files.items():
                _write(beside / file, data)
            shutil.rmtree(self.work / name, ignore_errors=True)
            beside.rename(self.work / name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Forget a checkpoint. Raises OSError."""
        going = (self.work / name).rename(self.work / f"{_HIDDEN}{name}-{uuid.uuid4().hex}")
        shutil.rmtree(going)

    def sweep(self) -> None:
        """Remove what cut-off saves and removals have left, while nothing is being saved. Raises OSError."""
        for cut_off in self.work.glob(f"{_HIDDEN}{checkpoint.PREFIX}*"):
            shutil.rmtree(cut_off)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the run, in ``work``. Raises OSError."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def pull(self) -> None:
        """Bring the run's files here, checkpoints excepted. Raises OSError."""

    def push(self) -> None:
        """Bring the run's files from here to where they are kept. Raises OSError."""


class Bucket(Storage):
    """A run's folder in a bucket: ``path`` on the file system ``place``; ``work`` is its copy in this machine's
    cache."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.place, self.path = filesystem(self.location)
        self.work = cache_dir() / "runs" / hashlib.sha256(self.location.encode()).hexdigest()[:16] / self.name
        self._known: dict[str, tuple[int, int]] = {}  # size and time of change of files as they were brought last

    def make(self) -> None:
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._put(f"{_HIDDEN}writable", b"")
            self.sweep()
        except OSError as error:
            raise UserError(f"cannot write {self.location} ({error}); give another --out") from error

    def checkpoints(self) -> list[str]:
        try:
            return sorted(name.partition("/")[0] for name in self._names() if checkpoint.is_last_file(name))
        except OSError as error:
            raise UserError(f"cannot look into {self.location} ({error})") from error

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
        for file, data in files.items():  # in this order: with the last one the checkpoint exists
            self._put(f"{name}/{file}", data)

    def remove(self, name: str) -> None:
        for file in reversed(checkpoint.FILES):
            self._remove(f"{name}/{file}")

    def sweep(self) -> None:
        names = self._names()
        whole = {name.partition("/")[0] for name in names if checkpoint.is_last_file(name)}
        for name in names:
            folder, _, file = name.partition("/")
            if file in checkpoint.FILES and folder.startswith(checkpoint.PREFIX) and folder not in whole:
                self._remove(name)

    def pull(self) -> None:
        """What has changed here since it was brought to the bucket stays: a killed process left it."""
        for name in self._names():
            here = self.work / name
            if name.startswith((_HIDDEN, checkpoint.PREFIX)) or self._is_changed(name, here):
                continue
            self.write(name, self._get(name))
            self._known[name] = _stamp(here)

    def push(self) -> None:
        # What is hidden may be gone the next moment, with whoever else works in this folder.
        for path in sorted(p for p in self.work.rglob("*") if not p.name.startswith(_HIDDEN) and p.is_file()):
            name = path.relative_to(self.work).as_posix()
            stamp = _stamp(path)
            if self._known.get(name) == stamp:
                continue
            self._put(name, path.read_bytes())
            self._known[name] = stamp

    def _is_changed(self, name: str, here: Path) -> bool:
        """Whether the file ``here`` is another than was brought last, and newer than the bucket's ``name``."""
        if not here.is_file() or self._known.get(name) == _stamp(here):
            return False
        path = f"{self.path}/{name}"
        return retry(lambda: self.place.modified(path), path).timestamp() < here.stat().st_mtime

    def _names(self) -> list[str]:
        """All objects of the run, from its folder on."""
        found = retry(lambda: self.place.find(self.path), self.location)
        return [path.removeprefix(self.path).lstrip("/") for path in found]

    def _get(self, name: str) -> bytes:
        path = f"{self.path}/{name}"
        return retry(lambda: self.place.cat_file(path), path)

    def _remove(self, name: str) -> None:
        path = f"{self.path}/{name}"
        retry(lambda: self.place.rm_file(path), path)

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self.path}/{name}"
        retry(lambda: self.place.pipe_file(path, data), path, tries=3)


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
