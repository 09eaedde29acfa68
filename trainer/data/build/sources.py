"""Where pictures come from: folders, zips, tars, data sets of ours and single files, all as a row of ``Member``s.

They lie on this machine, in buckets or on web servers. A web server has no folders, only data sets and files.
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
from pathlib import Path

from catgan.command import UserError, without_queries
from catgan.location import filesystem, is_url, join
from trainer.data.build import remote
from trainer.data.images import ImageError
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
    """A file of a source: its name from the source on, its length in bytes and how to get it, or a known problem.

    ``version`` changes when a file of a folder does; those of archives have their archive's.
    """

    name: str
    length: int = 0
    fetch: Callable[[], bytes] | None = None
    problem: str = ""
    version: str = ""

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
        except (FileNotFoundError, PermissionError) as error:
            raise ImageError(f"not readable: {error.strerror or 'gone, or no permission'}") from None
        except _UNREADABLE as error:
            raise ImageError(without_queries(f"not readable: {error}")) from None


@dataclass(frozen=True)
class Source:
    """What a user named: where it lies, the first part of its members' names, and what it is.

    ``kind`` is "folder", "set" (a data set of ours), "tar", "zip" or "file". ``version`` changes when a file does.
    """

    location: str
    name: str
    kind: str
    version: str = ""

    def members(self) -> Iterator[Member]:
        """The members, in an order that depends on nothing but the source.

        A member of a tar is to be read before the next one is asked for; those of a remote folder may be read at once.
        """
        if self.kind == "tar":
            return _in_tar(self.location, self.name)
        if self.kind == "zip":
            return _in_zip(self.location, self.name)
        if self.kind == "set":
            return _in_set(self.location, self.name)
        if self.kind == "folder":
            return _in_bucket(self.location, self.name) if self.remote else _in_folder(self.location, self.name)
        return iter([_remote_file(self) if self.remote else _on_disk(Path(self.location), self.name)])

    def count(self) -> int | None:
        """How many members there are; None for a tar that would have to be unpacked or fetched to know."""
        if self.kind == "tar" and (self.remote or not _is_plain_tar(self.location)):
            return None
        if self.kind == "set":
            return sum(split.images for split in Manifest.load(self.location).splits.values())
        return sum(1 for _ in self.members())

    @property
    def place(self) -> str:
        """The location, whatever the working folder is."""
        return self.location if self.remote else str(Path(self.location).resolve())

    @property
    def remote(self) -> bool:
        return is_url(self.location)


def check(source: str | Path) -> Source:
    """What lies at ``source``, a path or a URL.

    Raises:
        UserError: nothing does, it cannot be read, or it is an archive that is neither zip nor tar.
    """
    if is_url(source):
        return _check_remote(str(source).rstrip("/"))
    path = Path(source)
    name = path.resolve().name
    try:
        if path.is_dir():
            is_set = (path / MANIFEST).is_file() and next(path.glob("train-*.tar"), None)
            return Source(str(path), name, "set" if is_set else "folder")
        if not path.is_file():
            raise UserError(f"there is nothing at {path}: give a folder, zip, tar or picture")
        status = path.stat()
        return Source(str(path), name, _kind(str(path)), f"{status.st_size} {status.st_mtime_ns}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _check_remote(url: str) -> Source:
    filesystem(url)  # refuses what is no place to read from
    name = remote.name_of(url)
    # A web server cannot list a folder, but may hold a data set.
    if "?" not in url and _suffix(name) not in _ARCHIVES and remote.exists(join(url, MANIFEST)):
        return Source(url, name, "set")
    found = remote.info(url)
    if found["type"] == "directory":
        return Source(url, name, "folder")
    return Source(url, name, _kind(url), f"{found['size']} {remote.stamp(found)}")


def _kind(location: str) -> str:
    with remote.open_file(location) as file:
        if tarfile.is_tarfile(file):  # asked first: a tar that ends with a zip passes for a zip
            return "tar"
        if zipfile.is_zipfile(file):
            return "zip"
    if _suffix(location) in _ARCHIVES:
        raise UserError(f"{location} cannot be read as zip or tar: get it again, or unpack it and give the folder")
    return "file"


def _in_set(location: str, name: str) -> Iterator[Member]:
    manifest = Manifest.load(location)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        yield from _in_tar(join(location, shard.name), f"{name}/{shard.name}")


def _in_bucket(url: str, name: str) -> Iterator[Member]:
    for inside, length, version, fetch in remote.files(url):
        if _is_listed(inside):
            yield Member(f"{name}/{inside}", length, fetch, version=version)


def _remote_file(source: Source) -> Member:
    length = source.version.partition(" ")[0]
    known = int(length) if length.isdecimal() else None
    return Member(source.name, known or 0, functools.partial(remote.fetch, source.location, known))


def _in_folder(folder: str, name: str) -> Iterator[Member]:
    """The files, then what is in the folders, both by name. Paths are strings: Path takes longer than the disk."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if _is_listed(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    folders = []
    for entry in entries:
        inside = f"{name}/{entry.name}"
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # a link to itself
            yield Member(inside, problem=f"not readable: {error.strerror}")
            continue
        if not is_folder:
            yield _on_disk(entry, inside)
        elif entry.is_symlink():
            yield Member(inside, problem="a link to a folder: give it as a source of its own")
        else:
            folders.append(entry)
    for entry in folders:
        yield from _in_folder(entry.path, f"{name}/{entry.name}")


def _on_disk(file: Path | os.DirEntry[str], name: str) -> Member:
    try:
        status = file.stat()
    except OSError as error:  # a link to nothing, for one
        return Member(name, problem=f"not readable: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        return Member(name, problem="not a file")
    return Member(name, status.st_size, lambda: Path(file).read_bytes(), version=str(status.st_mtime_ns))


def _in_zip(location: str, name: str) -> Iterator[Member]:
    try:
        with remote.open_file(location) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir() and _is_listed(info.filename):
                    yield Member(f"{name}/{info.filename}", info.file_size, functools.partial(archive.read, info))
    except _UNREADABLE as error:
        yield Member(name, problem=f"not readable: {error}")


def _in_tar(location: str, name: str) -> Iterator[Member]:
    try:
        with remote.open_file(location) as file, tarfile.open(fileobj=file, mode="r:*", tarinfo=StrictInfo) as tar:
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


def _is_plain_tar(location: str) -> bool:
    try:
        tarfile.open(location, "r:").close()
    except tarfile.ReadError:
        return False
    return True


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower() if stem else ""


def _is_listed(name: str) -> bool:
    """Whether the path ``name`` may be a picture, by its parts: neither hidden, rubbish of macOS nor a note."""
    for part in name.split("/"):
        if part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")):
            return False
    return _suffix(name) not in _NOTES
