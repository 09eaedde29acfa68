"""Where data lies, by one name each: a path of this machine, a bucket (``s3://``, ``gs://``, ``az://``), a web server.

Names come from users and from job files, so what would run a program (``pipe:``), chain file systems (``::``) or carry
a secret is refused. Credentials come from the environment alone (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``...).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractFileSystem

from catgan.command import UserError, say

T = TypeVar("T")

PROTOCOLS = ("s3", "gs", "az", "http", "https")
TRIES = 5
_FIRST_PAUSE = 0.5  # seconds; each further one is twice as long


def is_url(location: str | Path) -> bool:
    """Whether ``location`` names something elsewhere. ``C:\\x`` is a path."""
    return re.match(r"[A-Za-z][\w+.-]+(://|::)|pipe:", str(location)) is not None


def local_path(location: str | Path) -> Path:
    """``location`` as a path of this machine. Raises UserError for a URL."""
    if is_url(location):
        raise UserError(f"{location} is a URL: only a path on this machine can be given here")
    return Path(location)


def join(root: str | Path, name: str) -> str:
    """``name`` in the folder ``root``."""
    return f"{str(root).rstrip('/')}/{name}" if is_url(root) else str(Path(root, name))


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the URL's path in it.

    Raises:
        UserError: the protocol is none of ``PROTOCOLS`` or lacks its package, or the URL has a password in it.
    """
    protocol = url.partition(":")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{url}: give a path, or a URL that begins with {', '.join(p + '://' for p in PROTOCOLS)}")
    try:
        netloc = urlsplit(url).netloc
    except ValueError as error:
        raise UserError(f"{url} is no URL: {error}") from None
    if "@" in netloc:
        raise UserError(f"{protocol}://...@...: credentials are read from the environment, not from the URL")
    try:
        # No listing is remembered: a bucket is asked again after something was written to it.
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **_options(protocol))
    except ImportError as error:
        raise UserError(f"{url}: {error}") from None


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    # By default a server that falls silent is waited for during five minutes, and at each attempt anew.
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def attempt(action: Callable[[], T], what: str, tries: int = TRIES) -> T:
    """The result of ``action``, tried again after growing pauses when the network or the server fails.

    Args:
        what: the name of the file or bucket, for what is said about the failures.
        tries: the pauses between them add up to 8 seconds for 5, and to a minute for 8.

    Raises:
        OSError: of the last try, or of the first if another is of no use (no such file, no permission).
    """
    pause = _FIRST_PAUSE
    for last in (*[False] * (tries - 1), True):
        try:
            return action()
        except _failures() as error:
            if last or isinstance(error, _lasting()):
                if isinstance(error, OSError):
                    raise
                raise OSError(_reason(error)) from error
            say(f"{what}: {_reason(error)}; trying again in {pause:.1f} s")
        time.sleep(pause * random.uniform(0.5, 1.0))  # readers that failed together should not come back together
        pause *= 2
    raise AssertionError


def _failures() -> tuple[type[Exception], ...]:
    """What reading and writing elsewhere raises; imported late, since data of this machine need not wait for it."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return OSError, ClientError, BotoCoreError


def _lasting() -> tuple[type[Exception], ...]:
    from botocore.exceptions import NoCredentialsError

    return FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NoCredentialsError


def read(location: str, length: int | None = None, tries: int = TRIES) -> bytes:
    """The whole file at ``location``.

    Args:
        length: in bytes, if it is known: a file that is shorter or longer is read again, then an error.

    Raises:
        OSError: it cannot be read, also after some tries.
    """
    if not is_url(location):
        return _whole(Path(location).read_bytes(), length)
    place, path = filesystem(location)
    return attempt(lambda: _whole(place.cat_file(path), length), location, tries)


def _whole(data: bytes, length: int | None) -> bytes:
    if length is not None and len(data) != length:
        raise OSError(f"{len(data)} bytes instead of {length}")
    return data


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
