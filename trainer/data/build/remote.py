"""Archives, pictures and folders of pictures in buckets and on web servers, as ``sources`` reads them."""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from fsspec.spec import AbstractFileSystem

from catgan.command import UserError
from catgan.location import filesystem, is_url, retry

_BLOCK = 4 << 20  # bytes fetched at a time of an archive: a few hundred pictures, or a header and the next picture


class Halted(UserError):
    """What the user's command was not to blame for: the work done so far is kept, and the same command goes on."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; what is done is kept, the same command goes on from there")


def name_of(url: str) -> str:
    """The last part of a URL's path, or the bucket or server."""
    parts = urlsplit(url)
    name = parts.path.rstrip("/").rpartition("/")[2] or parts.netloc
    return unquote(name) if parts.scheme in ("http", "https") else name


def stamp(info: dict[str, Any]) -> str:
    """What changes when a remote file does, as far as its server tells: the ETag, else the time of the change."""
    found = (info.get(key) for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "Last-Modified"))
    return str(next(filter(None, found), ""))


def info(url: str) -> dict[str, Any]:
    """What a server says of a URL: type ("file" or "directory"), size, ETag...

    Raises:
        UserError: there is nothing, or the server cannot be asked.
    """
    place, path = filesystem(url)
    try:
        return dict(retry(lambda: place.info(path), url))
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # so fsspec's http reports a server that does not answer
            raise UserError(f"cannot read {url}: {error.__cause__}") from None
        raise UserError(f"there is nothing at {url}: give a folder, zip, tar or picture") from None
    except OSError as error:
        raise UserError(f"cannot read {url}: {error}") from None


def exists(url: str) -> bool:
    """Whether there is a file. Raises UserError if the server cannot be asked."""
    place, path = filesystem(url)
    try:
        return bool(retry(lambda: place.info(path), url)["type"] == "file")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {url}: {error}") from None


def files(url: str) -> Iterator[tuple[str, int, str, Callable[[], bytes]]]:
    """The objects below a prefix: name from there on, bytes, ``stamp``, and how to get the content; files come before
    folders, both by name, and one folder's names are in memory at a time.

    Raises:
        Halted: the listing failed in spite of retries.
    """
    place, path = filesystem(url)
    yield from _files(place, path.rstrip("/"), "", url)


def _files(place: AbstractFileSystem, path: str, inside: str, url: str) -> Iterator[tuple[str, int, str, Any]]:
    try:
        # ls fails for a folder that has gone in the meantime, or that is empty.
        found = retry(lambda: place.ls(path, detail=True), url)
    except OSError as error:
        raise Halted(f"cannot list {url}: {error}") from None
    folders = []
    for entry in sorted(found, key=lambda entry: entry["name"]):
        full = entry["name"].rstrip("/")
        name = full.rpartition("/")[2]
        if full == path:  # an object that stands for the folder
            continue
        if entry["type"] == "directory":
            folders.append((full, f"{inside}{name}/"))
        else:
            fetch = functools.partial(_fetch, place, full, entry["size"], f"{url.rstrip('/')}/{inside}{name}")
            yield inside + name, entry["size"] or 0, stamp(entry), fetch
    for full, deeper in folders:
        yield from _files(place, full, deeper, url)


def fetch(url: str, length: int | None) -> bytes:
    """The content of the file at ``url``.

    Raises:
        FileNotFoundError, PermissionError: this file cannot be had.
        Halted: the network or the server failed in spite of retries.
    """
    place, path = filesystem(url)
    return _fetch(place, path, length, url)


def _fetch(place: AbstractFileSystem, path: str, length: int | None, url: str) -> bytes:
    def whole() -> bytes:
        # Asked for a whole file, s3fs asks for its length first.
        data: bytes = place.cat_file(path, start=0, end=length) if length else place.cat_file(path)
        if length is not None and len(data) != length:
            raise OSError(f"{len(data)} bytes instead of {length}")
        return data

    try:
        return retry(whole, url)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise Halted(f"cannot read {url}: {error}") from None


def open_file(location: str | Path) -> IO[bytes]:
    """The file at ``location`` to read and seek in; of a remote one only what is looked at is fetched, in blocks.

    A web server that sends files only as a whole has the file copied to a temporary one.

    Raises:
        Halted: opening, or reading later on, failed in spite of retries.
    """
    if not is_url(location):
        return Path(location).open("rb")
    url = str(location)
    place, path = filesystem(url)
    raw = _Blocks(place, path, url)
    try:
        raw.seek(1)  # a server that knows no ranges has no trouble with the first byte
        raw.read(1)
    except ValueError:
        with raw:
            return _copied(place, path, url)
    raw.seek(0)
    return io.BufferedReader(raw, _BLOCK)


class _Blocks(io.RawIOBase):
    """A remote file whose reads are tried again when they fail."""

    def __init__(self, place: AbstractFileSystem, path: str, url: str) -> None:
        self._url = url
        self._file = self._attempt(lambda: place.open(path, "rb", cache_type="none"))
        self._position = 0

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return retry(action, self._url)
        except OSError as error:
            raise Halted(f"cannot read {self._url}: {error}") from None

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
        data = self._attempt(lambda: self._read(len(buffer)))
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


def _copied(place: AbstractFileSystem, path: str, url: str) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)

    def whole() -> None:
        copy.seek(0)
        copy.truncate()
        with place.open(path, "rb", block_size=0) as file:
            shutil.copyfileobj(file, copy, _BLOCK)

    try:
        retry(whole, url)
    except OSError as error:
        copy.close()
        raise Halted(f"cannot read {url}: {error}") from None
    copy.seek(0)
    return copy
