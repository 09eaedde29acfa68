"""Where pictures come from: folders, zips, tars, data sets of ours and single files, all as a row of ``Member``s.

Members are read into memory only, never unpacked, so a name like ``../../x`` or a link in an archive leads nowhere.
Not listed, by name alone: hidden files, ``__MACOSX`` and notes beside pictures (``.json``, ``.txt``, ``.csv``...).
Everything else is, and a member that cannot be read says why.
"""

from __future__ import annotations

import functools
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from infer.command import UserError
from trainer.data.images import ImageError
from trainer.data.location import local_path
from trainer.data.manifest import MANIFEST, Manifest
from trainer.data.tars import StrictInfo

MAX_BYTES = 256 << 20
"""Longer files are not read: they have to fit into memory, and a zip can unpack to any length."""

_NOTES = {".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".cls"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".rar", ".7z"}

# What reading a file, a member of a zip or of a tar raises when it is damaged, encrypted or packed unusually.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """A file of a source: its name from the source on, its length in bytes and how to get it, or a known problem."""

    name: str
    length: int = 0
    fetch: Callable[[], bytes] | None = None
    problem: str = ""

    def read(self) -> bytes:
        """The content. Raises ImageError with the reason if there is none to be had."""
        if self.fetch is None:
            raise ImageError(self.problem)
        if _suffix(self.name) in _ARCHIVES:
            raise ImageError("an archive: give it as a source of its own")
        if self.length > MAX_BYTES:
            raise ImageError(f"too large: {self.length:,} bytes, at most {MAX_BYTES:,}")
        try:
            return self.fetch()
        except _UNREADABLE as error:
            raise ImageError(f"not readable: {error}") from None


def check(source: str | Path) -> Path:
    """``source`` as a path that ``members`` can list.

    Raises:
        UserError: a URL, no such file, or an archive that is neither zip nor tar.
    """
    path = local_path(source)
    try:
        if path.is_dir():
            return path
        if not path.is_file():
            raise UserError(f"there is nothing at {path}: give a folder, zip, tar or picture")
        if _suffix(path.name) in _ARCHIVES and not (tarfile.is_tarfile(path) or zipfile.is_zipfile(path)):
            raise UserError(f"{path} cannot be read as zip or tar: download it again, or unpack it and give the folder")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return path


def members(path: Path) -> Iterator[Member]:
    """The members of a source, in an order that depends on nothing but the source.

    A member of a tar is to be read before the next one is asked for.
    """
    name = path.resolve().name
    if path.is_file():
        if tarfile.is_tarfile(path):  # asked first: a tar that ends with a zip passes for a zip
            yield from _in_tar(path, name)
        elif zipfile.is_zipfile(path):
            yield from _in_zip(path, name)
        else:
            yield _on_disk(path, name)
    elif (path / MANIFEST).is_file() and next(path.glob("train-*.tar"), None):
        manifest = Manifest.load(path)
        for shard in map(Path, (p for split in manifest.splits for p in manifest.paths(split))):
            yield from _in_tar(shard, f"{name}/{shard.name}")
    else:
        yield from _in_folder(path, name)


def count(path: Path) -> int | None:
    """How many members a source has; None for a compressed tar, which would have to be unpacked to know."""
    if path.is_file() and tarfile.is_tarfile(path) and not _is_plain_tar(path):
        return None
    return sum(1 for _ in members(path))


def _in_folder(root: Path, name: str) -> Iterator[Member]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(root, onerror=refuse):
        inside = PurePosixPath(name, *Path(parent).relative_to(root).parts)
        folders[:] = sorted(filter(_is_listed, folders))
        for folder in folders:
            if Path(parent, folder).is_symlink():
                yield Member(str(inside / folder), problem="a link to a folder: give it as a source of its own")
        for file in sorted(filter(_is_listed, files)):
            yield _on_disk(Path(parent, file), str(inside / file))


def _on_disk(path: Path, name: str) -> Member:
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing, for one
        return Member(name, problem=f"not readable: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        return Member(name, problem="not a file")
    return Member(name, status.st_size, path.read_bytes)


def _in_zip(path: Path, name: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and _is_listed(info.filename):
                    yield Member(f"{name}/{info.filename}", info.file_size, functools.partial(archive.read, info))
    except _UNREADABLE as error:
        yield Member(name, problem=f"not readable: {error}")


def _in_tar(path: Path, name: str) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:*", tarinfo=StrictInfo) as tar:
            while (info := tar.next()) is not None:
                # A TarFile remembers all it has met: a GiB for a million members.
                tar.members = []  # type: ignore[attr-defined]
                if info.isdir() or not _is_listed(info.name):
                    continue
                inside = f"{name}/{info.name}"
                if info.isreg():
                    yield Member(inside, info.size, functools.partial(_extract, tar, info))
                else:
                    yield Member(inside, problem="not a file")
    except _UNREADABLE as error:
        yield Member(name, problem=f"not readable: the tar breaks off, {error}")


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(info)
    assert content is not None, info
    return content.read()


def _is_plain_tar(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        return False
    return True


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_listed(name: str) -> bool:
    """Whether the path ``name`` may be a picture, by its parts: neither hidden, rubbish of macOS nor a note."""
    parts = PurePosixPath(name).parts
    hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)
    return not hidden and _suffix(name) not in _NOTES
