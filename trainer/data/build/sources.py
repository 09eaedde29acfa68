"""Sources of images: folders, zips, tars, data sets made before and single files, each as a sequence of ``Member``s.

A source is on this machine, in a bucket or on a web server; on a web server it cannot be a folder, except a data set.
Members are read into memory and never unpacked to disk, so names like ``../../x`` and links in archives do no harm.

Not listed are hidden files, ``__MACOSX`` and annotations beside images (``.json``, ``.txt``, ``.csv`` and others), by
their names alone; and what this project's commands wrote, see ``outputs``. All other files are listed, those that
cannot be read with the reason.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from catgan.command import UserError
from catgan.dataset import MANIFEST, Manifest
from catgan.location import filesystem, is_url, join, local_path, resolved_path
from catgan.outputs import own_files, owner
from trainer.data.build import remote
from trainer.data.build.archives import in_tar, in_zip, is_plain_tar
from trainer.data.build.errors import ResumableError
from trainer.data.build.members import Member
from trainer.data.build.names import ARCHIVES, is_listed, member_name, suffix
from trainer.data.tars import is_tar


@dataclass(frozen=True)
class Source:
    """A source that the user named.

    Attributes:
        location: a path or a URL.
        name: the first part of its members' names.
        kind: "folder", "set" (a data set made before), "tar", "zip" or "file".
        version: changes when an archive, a data set or a single file does; empty for folders.
        without: URL of a folder in a bucket that is not listed.
        own: folders with files that this project's commands wrote, which are not listed, each with its kind; complete
            when ``members`` has ended.
    """

    location: str
    name: str
    kind: str
    version: str = ""
    without: str = ""
    own: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    @property
    def absolute_location(self) -> str:
        """The location, independent of the working directory."""
        return self.location if self.is_remote else str(resolved_path(self.location))

    @property
    def allows_concurrent_reads(self) -> bool:
        """Whether members may be read in any order and at the same time, which pays for buckets."""
        return self.kind == "folder" and self.is_remote

    def members(self) -> Iterator[Member]:
        """The members, in an order that depends on the source alone.

        Unless the source ``allows_concurrent_reads``, each member must be read before the next one is requested.
        """
        if self.kind in ("tar", "zip"):
            members = in_tar if self.kind == "tar" else in_zip
            return members(self.location, self.name, lambda path, kind: self._note(f"{self.name}/{path}", kind))
        if self.kind == "set":
            return _in_data_set(self.location, self.name)
        if self.kind == "folder":
            return self._in_bucket() if self.is_remote else self._in_folder(self.location, self.name)
        return iter([_remote_file(self) if self.is_remote else _on_disk(Path(self.location), self.name)])

    def count(self) -> int | None:
        """The number of members; None for a tar that would have to be decompressed or fetched for that."""
        if self.kind == "tar" and (self.is_remote or not is_plain_tar(self.location)):
            return None
        if self.kind == "set":
            return sum(split.images for split in Manifest.load(self.location).splits.values())
        return sum(1 for _ in self.members())

    def check_is_there(self) -> None:
        """To be called when a member cannot be read: is it that one, or all of them?

        Raises:
            ResumableError: the source itself cannot be read any more, since a disk was unplugged, a network mount is
                gone or credentials have expired.
        """
        try:
            if self.is_remote:
                remote.info(join(self.location, MANIFEST) if self.kind == "set" else self.location)
            elif self.kind != "folder":
                Path(self.location).stat()
            else:
                with os.scandir(self.location) as found:
                    if next(found, None) is None:  # what an unmounted file system leaves
                        raise ResumableError(f"{self.location} is empty now")
        except ResumableError:
            raise
        except OSError as error:
            raise ResumableError(f"cannot read {self.location} any more: {error.strerror}") from None
        except UserError as error:
            raise ResumableError(str(error)) from None

    def _note(self, folder: str, kind: str) -> None:
        self.own[folder.rstrip("/")] = kind

    def _own(self, folder: str, names: Collection[str]) -> Collection[str]:
        """The ``names`` in ``folder``, which begins with the source's name, that are not listed: our own files."""
        found = own_files(names)
        for kind in found.values():
            self._note(folder, kind)
        return found

    def _in_folder(self, folder: str, name: str) -> Iterator[Member]:
        """Files come before folders, both by name. Paths are strings, because Path is slower than the disk."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from None
        own = self._own(name, [entry.name for entry in entries])
        folders = []
        for entry in entries:
            inside = f"{name}/{entry.name}"
            if entry.name in own or not is_listed(member_name(entry.name)):
                continue
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
            yield from self._in_folder(entry.path, f"{name}/{entry.name}")

    def _in_bucket(self) -> Iterator[Member]:
        def skipped(folder: str, names: Collection[str]) -> Collection[str]:
            here = f"{folder}/" if folder else ""
            without = [name for name in names if f"{self.location}/{here}{name}" == self.without]
            return {*self._own(f"{self.name}/{folder}", names), *without}

        for file in remote.files(self.location, skipped):
            if is_listed(member_name(file.path)):
                yield Member(f"{self.name}/{file.path}", file.length, file.fetch, version=file.version)


def identify(location: str | Path) -> Source:
    """The source at ``location``, a path or a URL.

    Raises:
        UserError: there is nothing, it cannot be read, it is an archive that is neither zip nor tar, or a sheet or
            folder that this project's commands wrote.
    """
    if is_url(location):
        return _identify_remote(str(location).rstrip("/"))
    path = local_path(location)
    absolute = resolved_path(path)
    try:
        if path.is_dir():
            _check_not_own(path, absolute)
            if (path / MANIFEST).is_file() and next(path.glob("train-*.tar"), None):
                return Source(str(path), absolute.name, "set", Manifest.load(path).digest)
            return Source(str(path), absolute.name, "folder")
        if not path.is_file():
            raise UserError(f"there is nothing at {path}: give a folder, zip, tar or image")
        status = path.stat()
        kind = _kind(str(path))
        if kind == "file":
            _check_not_own(path, absolute)
        return Source(str(path), absolute.name, kind, f"{status.st_size} {status.st_mtime_ns}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _check_not_own(path: Path, absolute: Path) -> None:
    if found := owner(absolute):
        folder, kind = found
        raise UserError(f"{path} is part of the {kind} in {folder}: give photos, or a whole data set")


def _identify_remote(url: str) -> Source:
    filesystem(url)  # raises UserError for URLs that are not allowed
    name = remote.name_of(url)
    # A web server cannot list a folder, but may hold a data set.
    if "?" not in url and suffix(name) not in ARCHIVES and _is_data_set(url):
        return Source(url, name, "set", Manifest.load(url).digest)
    found = remote.info(url)
    if found["type"] == "directory":
        return Source(url, name, "folder")
    return Source(url, name, _kind(url), f"{found['size']} {remote.version_of(found)}")


def _is_data_set(url: str) -> bool:
    """Whether the folder at ``url`` holds a manifest of ours; other programs write a manifest.json, too."""
    if not remote.exists(path := join(url, MANIFEST)):
        return False
    try:
        record = json.loads(remote.fetch(path, None))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"format_version", "splits"} <= record.keys()


def _kind(location: str) -> str:
    with remote.open_file(location) as file:
        if is_tar(file):  # checked first, because a tar whose last member is a zip also looks like a zip
            return "tar"
        if zipfile.is_zipfile(file):
            return "zip"
    if suffix(location) in ARCHIVES:
        raise UserError(f"{location} cannot be read as zip or tar: get it again, or unpack it and give the folder")
    return "file"


def _in_data_set(location: str, name: str) -> Iterator[Member]:
    manifest = Manifest.load(location)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        yield from in_tar(join(location, shard.name), f"{name}/{shard.name}", lambda *_: None)


def _remote_file(source: Source) -> Member:
    length = source.version.partition(" ")[0]
    known = int(length) if length.isdecimal() else None
    return Member(source.name, known or 0, functools.partial(remote.fetch, source.location, known))


def _on_disk(file: Path | os.DirEntry[str], name: str) -> Member:
    try:
        status = file.stat()
    except OSError as error:  # a broken link, for example
        return Member(name, problem=f"not readable: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
        return Member(name, problem="not a file")
    return Member(name, status.st_size, lambda: Path(file).read_bytes(), version=str(status.st_mtime_ns))
