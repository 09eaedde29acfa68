"""Sources of images: folders, zips, tars, data sets made before and single files, each as a sequence of ``Member``s.

A source is on this machine, in a bucket or on a web server; on a web server it cannot be a folder, except a data set.
Members are read into memory and never unpacked to disk, so names like ``../../x`` and links in archives do no harm.

Not listed, by their names alone, are hidden files, ``__MACOSX`` and annotations beside images (``.json``, ``.txt``,
``.csv`` and others). All other files are listed, those that cannot be read with the reason.
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
from catgan.dataset import MANIFEST, Manifest
from catgan.location import filesystem, is_url, join
from trainer.data.build import remote
from trainer.data.images import ImageError
from trainer.data.tars import StrictInfo

MAX_BYTES = 256 << 20
"""Longer files are rejected: a file must fit into memory, and a member of a zip can unpack to any length."""

_ANNOTATIONS = {".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".cls"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".rar", ".7z"}

# What reading a file, or a member of an archive, raises if it is damaged, encrypted or compressed in a rare way.
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
    """A file of a source.

    Attributes:
        name: its path, beginning with the name of the source.
        length: in bytes.
        fetch: returns its content; None if it cannot be read.
        problem: why it cannot be read.
        version: changes when a file in a folder does; empty in archives, whose sources have a version.
    """

    name: str
    length: int = 0
    fetch: Callable[[], bytes] | None = None
    problem: str = ""
    version: str = ""

    def read(self) -> bytes:
        """The content. Raises ImageError with the reason if it cannot be read."""
        if self.fetch is None:
            raise ImageError(self.problem)
        if _suffix(self.name) in _ARCHIVES:
            raise ImageError("an archive: give it as a source of its own")
        if self.length > MAX_BYTES:
            raise ImageError(f"too large: {self.length:,} bytes, at most {MAX_BYTES:,}")
        try:
            return self.fetch()
        except (FileNotFoundError, PermissionError) as error:
            raise ImageError(f"not readable: {error.strerror or 'deleted, or no permission'}") from None
        except _UNREADABLE as error:
            raise ImageError(without_queries(f"not readable: {error}")) from None


@dataclass(frozen=True)
class Source:
    """A source that the user named.

    Attributes:
        location: a path or a URL.
        name: the first part of its members' names.
        kind: "folder", "set" (a data set made before), "tar", "zip" or "file".
        version: changes when an archive or a single file does; empty for folders and data sets.
    """

    location: str
    name: str
    kind: str
    version: str = ""

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    @property
    def absolute_location(self) -> str:
        """The location, independent of the working directory."""
        return self.location if self.is_remote else str(Path(self.location).resolve())

    @property
    def allows_concurrent_reads(self) -> bool:
        """Whether members may be read in any order and at the same time, which pays for buckets."""
        return self.kind == "folder" and self.is_remote

    def members(self) -> Iterator[Member]:
        """The members, in an order that depends on the source alone.

        Unless the source ``allows_concurrent_reads``, each member must be read before the next one is requested.
        """
        if self.kind == "tar":
            return _in_tar(self.location, self.name)
        if self.kind == "zip":
            return _in_zip(self.location, self.name)
        if self.kind == "set":
            return _in_data_set(self.location, self.name)
        if self.kind == "folder":
            return _in_bucket(self.location, self.name) if self.is_remote else _in_folder(self.location, self.name)
        return iter([_remote_file(self) if self.is_remote else _on_disk(Path(self.location), self.name)])

    def count(self) -> int | None:
        """The number of members; None for a tar that would have to be decompressed or fetched for that."""
        if self.kind == "tar" and (self.is_remote or not _is_plain_tar(self.location)):
            return None
        if self.kind == "set":
            return sum(split.images for split in Manifest.load(self.location).splits.values())
        return sum(1 for _ in self.members())


def identify(location: str | Path) -> Source:
    """The source at ``location``, a path or a URL.

    Raises:
        UserError: there is nothing, it cannot be read, or it is an archive that is neither zip nor tar.
    """
    if is_url(location):
        return _identify_remote(str(location).rstrip("/"))
    path = Path(location)
    name = path.resolve().name
    try:
        if path.is_dir():
            is_set = (path / MANIFEST).is_file() and next(path.glob("train-*.tar"), None)
            return Source(str(path), name, "set" if is_set else "folder")
        if not path.is_file():
            raise UserError(f"there is nothing at {path}: give a folder, zip, tar or image")
        status = path.stat()
        return Source(str(path), name, _kind(str(path)), f"{status.st_size} {status.st_mtime_ns}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _identify_remote(url: str) -> Source:
    filesystem(url)  # raises UserError for URLs that are not allowed
    name = remote.name_of(url)
    # A web server cannot list a folder, but may hold a data set.
    if "?" not in url and _suffix(name) not in _ARCHIVES and remote.exists(join(url, MANIFEST)):
        return Source(url, name, "set")
    found = remote.info(url)
    if found["type"] == "directory":
        return Source(url, name, "folder")
    return Source(url, name, _kind(url), f"{found['size']} {remote.version_of(found)}")


def _kind(location: str) -> str:
    with remote.open_file(location) as file:
        if tarfile.is_tarfile(file):  # checked first, because a tar whose last member is a zip also looks like a zip
            return "tar"
        if zipfile.is_zipfile(file):
            return "zip"
    if _suffix(location) in _ARCHIVES:
        raise UserError(f"{location} cannot be read as zip or tar: get it again, or unpack it and give the folder")
    return "file"


def _in_data_set(location: str, name: str) -> Iterator[Member]:
    manifest = Manifest.load(location)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        yield from _in_tar(join(location, shard.name), f"{name}/{shard.name}")


def _in_bucket(url: str, name: str) -> Iterator[Member]:
    for file in remote.files(url):
        if _is_listed(file.path):
            yield Member(f"{name}/{file.path}", file.length, file.fetch, version=file.version)


def _remote_file(source: Source) -> Member:
    length = source.version.partition(" ")[0]
    known = int(length) if length.isdecimal() else None
    return Member(source.name, known or 0, functools.partial(remote.fetch, source.location, known))


def _in_folder(folder: str, name: str) -> Iterator[Member]:
    """Files come before folders, both by name. Paths are strings, because Path is slower than the disk."""
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
    except OSError as error:  # a broken link, for example
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
                # A TarFile keeps all members it has read, 1 GiB for a million.
                tar.members = []  # type: ignore[attr-defined]
                if info.isdir() or not _is_listed(info.name):
                    continue
                inside = f"{name}/{info.name}"
                if info.isreg():
                    yield Member(inside, info.size, functools.partial(_extract, tar, info))
                else:
                    yield Member(inside, problem="not a file")
    except _UNREADABLE as error:
        yield Member(name, problem=f"not readable: the tar is truncated or damaged, {error}")


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
    """Whether the path ``name`` may be an image, by its name alone: not hidden, of macOS, or an annotation."""
    for part in name.split("/"):
        if part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")):
            return False
    return _suffix(name) not in _ANNOTATIONS
