"""Files, folders and archives in buckets and on web servers, for ``sources``."""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from fsspec.spec import AbstractFileSystem

from catgan.command import UserError
from catgan.location import filesystem, is_url, retry
from trainer.data.build.errors import ResumableError

_BLOCK = 4 << 20  # bytes of an archive fetched at a time: a few hundred images, or a header and the next image


class RemoteFile(NamedTuple):
    """A file below a URL: its path from there on, length in bytes, ``version_of`` it, and how to get its content."""

    path: str
    length: int
    version: str
    fetch: Callable[[], bytes]


def name_of(url: str) -> str:
    """The last part of a URL's path; the bucket or server if the path is empty."""
    parts = urlsplit(url)
    name = parts.path.rstrip("/").rpartition("/")[2] or parts.netloc
    return unquote(name) if parts.scheme in ("http", "https") else name


def version_of(info: dict[str, Any]) -> str:
    """What changes when a remote file does, as far as its server tells: the ETag, else the time of the last change."""
    found = (info.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "Last-Modified"))
    return str(next(filter(None, found), ""))


def info(url: str) -> dict[str, Any]:
    """What the server says about a URL: type ("file" or "directory"), size, ETag and others.

    Raises:
        UserError: there is nothing at the URL, or the server does not answer.
    """
    fs, path = filesystem(url)
    try:
        return dict(retry(lambda: fs.info(path), url))
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # how fsspec's http reports a server that does not answer
            raise UserError(f"cannot read {url}: {error.__cause__}") from None
        raise UserError(f"there is nothing at {url}: give a folder, zip, tar or image") from None
    except OSError as error:
        raise UserError(f"cannot read {url}: {error}") from None


def exists(url: str) -> bool:
    """Whether there is a file at the URL. Raises UserError if the server does not answer."""
    fs, path = filesystem(url)
    try:
        return bool(retry(lambda: fs.info(path), url)["type"] == "file")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {url}: {error}") from None


Skip = Callable[[str, Collection[str]], Collection[str]]
"""Called with the path of a folder, without a final slash, and the names in it; returns those to skip."""


def files(url: str, skip: Skip = lambda folder, names: ()) -> Iterator[RemoteFile]:
    """The files below a URL in a fixed order: of each folder first its files, then its subfolders, both by name.

    Only one folder's listing is in memory at a time.

    Raises:
        ResumableError: the listing failed in spite of retries.
    """
    fs, path = filesystem(url)
    yield from _files(fs, path.rstrip("/"), "", url, skip)


def _files(fs: AbstractFileSystem, path: str, prefix: str, url: str, skip: Skip) -> Iterator[RemoteFile]:
    try:
        # ls fails if the folder was deleted in the meantime, or is empty.
        found = retry(lambda: fs.ls(path, detail=True), url)
    except OSError as error:
        raise ResumableError(f"cannot list {url}: {error}") from None
    named = sorted(((entry["name"].rstrip("/"), entry) for entry in found), key=lambda pair: pair[0])
    named = [(full, entry) for full, entry in named if full != path]  # an object that represents the folder itself
    skipped = skip(prefix.rstrip("/"), [full.rpartition("/")[2] for full, _ in named])
    folders = []
    for full, entry in named:
        name = full.rpartition("/")[2]
        if name in skipped:
            continue
        if entry["type"] == "directory":
            folders.append((full, f"{prefix}{name}/"))
        else:
            fetch = functools.partial(_fetch, fs, full, entry["size"], f"{url.rstrip('/')}/{prefix}{name}")
            yield RemoteFile(prefix + name, entry["size"] or 0, version_of(entry), fetch)
    for full, inner_prefix in folders:
        yield from _files(fs, full, inner_prefix, url, skip)


def fetch(url: str, length: int | None) -> bytes:
    """The content of the file at ``url``, which must have ``length`` bytes if that is known.

    Raises:
        FileNotFoundError, PermissionError: this file cannot be read.
        ResumableError: the network or the server failed in spite of retries.
    """
    fs, path = filesystem(url)
    return _fetch(fs, path, length, url)


def _fetch(fs: AbstractFileSystem, path: str, length: int | None, url: str) -> bytes:
    def read() -> bytes:
        # Without a range, s3fs would first request the length.
        data: bytes = fs.cat_file(path, start=0, end=length) if length else fs.cat_file(path)
        if length is not None and len(data) != length:
            raise OSError(f"{len(data)} bytes instead of {length}")
        return data

    try:
        return retry(read, url)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise ResumableError(f"cannot read {url}: {error}") from None


def open_file(location: str | Path) -> IO[bytes]:
    """Open the file at ``location``, a path or a URL, to read and seek in.

    Of a remote file only the blocks that are read are fetched. If a web server does not support ranges, the whole file
    is copied to a temporary file.

    Raises:
        ResumableError: opening, or reading later on, failed in spite of retries.
    """
    if not is_url(location):
        return Path(location).open("rb")
    url = str(location)
    fs, path = filesystem(url)
    blocks = _BlockReader(fs, path, url)
    try:
        blocks.seek(1)  # reading the first byte would work without ranges, too
        blocks.read(1)
    except ValueError:
        with blocks:
            return _temporary_copy(fs, path, url)
    blocks.seek(0)
    return io.BufferedReader(blocks, _BLOCK)


class _BlockReader(io.RawIOBase):
    """A remote file that is read in ranges; failed reads are retried."""

    def __init__(self, fs: AbstractFileSystem, path: str, url: str) -> None:
        self._url = url
        self._file = self._retry(lambda: fs.open(path, "rb", cache_type="none"))
        self._position = 0

    def _retry(self, action: Callable[[], Any]) -> Any:
        try:
            return retry(action, self._url)
        except OSError as error:
            raise ResumableError(f"cannot read {self._url}: {error}") from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size or 0}[whence]
        if start + offset < 0:
            raise OSError("a position before the beginning of the file")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, length: int) -> bytes:
        if not isinstance(self._file.size, int):
            raise ValueError("a file of unknown length cannot be read in parts")
        expected = max(min(length, self._file.size - self._position), 0)
        if not expected:
            return b""
        self._file.seek(self._position)
        data: bytes = self._file.read(expected)
        if len(data) != expected:
            raise OSError(f"{len(data)} bytes instead of {expected}")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _temporary_copy(fs: AbstractFileSystem, path: str, url: str) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)

    def download() -> None:
        copy.seek(0)
        copy.truncate()
        with fs.open(path, "rb", block_size=0) as file:
            shutil.copyfileobj(file, copy, _BLOCK)

    try:
        retry(download, url)
    except OSError as error:
        copy.close()
        raise ResumableError(f"cannot read {url}: {error}") from None
    copy.seek(0)
    return copy
