"""Locations of files: local paths, and URLs of buckets (``s3://``, ``gs://``, ``az://``) and web servers.

Locations come from users and job files. URLs that run a program (``pipe:``), chain file systems (``::``) or contain a
password are refused. Credentials are read from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``...).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from catgan.command import STDOUT, UserError, say

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

T = TypeVar("T")

PROTOCOLS = ("s3", "gs", "az", "http", "https")
TRIES = 5
# No OSError: gcsfs raises it once its own retries are used up, adlfs passes it on.
_OTHER_FAILURES = (
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
_FIRST_PAUSE = 0.5  # seconds; doubles after each failure


def is_url(location: str | Path) -> bool:
    """Whether ``location`` is a URL. A Windows path such as ``C:\\x`` is not."""
    return re.match(r"[A-Za-z][\w+.-]+(://|::)|pipe:", str(location)) is not None


def local_path(location: str | Path) -> Path:
    """``location`` as a local path, in which ``~`` and ``..`` are resolved.

    As for the system, ``..`` after a symbolic link is the parent of the folder that it leads to. After a folder that
    does not exist it is the parent of the name, so that a path means the same before and after folders are created.
    Functions that create or open files call this first, because ``nope/../x`` itself cannot be opened.

    Raises:
        UserError: it is a URL, or begins with ``-`` alone, which elsewhere stands for standard input or output.
    """
    if is_url(location):
        raise UserError(f"{location} is a URL: give a local path")
    path = Path(location)
    if path.parts[:1] == (STDOUT,):
        raise UserError(f"{location}: - stands for standard input or output, which cannot be used here; give a path")
    with contextlib.suppress(RuntimeError):  # no such user: a name that begins with ~
        path = path.expanduser()
    if ".." in path.parts:
        end = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:end])), *path.parts[end:])
    return path


def resolved_path(location: str | Path) -> Path:
    """``location`` as the absolute local path without symbolic links, see ``local_path``: one for each file or folder,
    also before it exists."""
    return Path(os.path.realpath(local_path(location)))


def join(root: str | Path, name: str) -> str:
    """The location of ``name`` in the folder ``root``."""
    return f"{str(root).rstrip('/')}/{name}" if is_url(root) else str(Path(root, name))


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path of the URL in it.

    Raises:
        UserError: the protocol is not one of ``PROTOCOLS``, its package is not installed, or the URL contains a
            password.
    """
    protocol = url.partition(":")[0]
    if protocol not in PROTOCOLS:
        raise UserError(f"{url}: give a path, or a URL that begins with {', '.join(p + '://' for p in PROTOCOLS)}")
    try:
        netloc = urlsplit(url).netloc
    except ValueError as error:
        raise UserError(f"{url} is not a URL: {error}") from None
    if "@" in netloc:
        raise UserError(f"{protocol}://...@...: credentials are read from the environment, not from the URL")
    if "::" in url:  # fsspec would split there
        raise UserError(f"{url}: a URL cannot contain ::; for a server with an IPv6 address give its name")
    import fsspec  # on use: local data, and catinfer, do without it

    try:
        # Without a cache of listings, which would not show what was written since.
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **_options(protocol))
    except ImportError as error:
        raise UserError(f"{url}: {error}") from None


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    # The default waits five minutes for a server that does not answer, in each attempt.
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def retry(action: Callable[[], T], what: str, tries: int = TRIES) -> T:
    """The result of ``action``, which is repeated with exponential backoff while the network or the server fails.

    Args:
        what: location of the file or bucket, for messages.
        tries: calls of ``action`` before giving up. All pauses together take up to 8 seconds for 5 tries, and up to a
            minute for 8.

    Raises:
        OSError: the last call failed, or one failed permanently (no such file, no permission, no credentials).
    """
    pause = _FIRST_PAUSE
    for tries_left in reversed(range(tries)):
        try:
            return action()
        except _failures() as error:
            if not tries_left or isinstance(error, _permanent_failures()):
                if isinstance(error, OSError):
                    raise
                raise OSError(_reason(error)) from error
            say(f"{what}: {_reason(error)}; trying again in {pause:.1f} s")
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter, so that readers do not all retry at the same time
        pause *= 2
    raise AssertionError


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of remote file systems. Imported on use: local data needs none of these packages. Those of Google
    and Azure, which have packages of their own, can come from a package only that was imported."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    others = [getattr(sys.modules[module], name) for module, name in _OTHER_FAILURES if module in sys.modules]
    return OSError, ClientError, BotoCoreError, *others


def _permanent_failures() -> tuple[type[Exception], ...]:
    from botocore.exceptions import NoCredentialsError

    return FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NoCredentialsError


def read(location: str, length: int | None = None, tries: int = TRIES) -> bytes:
    """The content of the file at ``location``.

    Args:
        length: in bytes, if known. Content of another length counts as a failure.
        tries: attempts to read a URL, see ``retry``.

    Raises:
        OSError: the file cannot be read.
    """
    if not is_url(location):
        return _check_length(Path(location).read_bytes(), length)
    remote, path = filesystem(location)
    return retry(lambda: _check_length(remote.cat_file(path), length), location, tries)


def _check_length(data: bytes, length: int | None) -> bytes:
    if length is not None and len(data) != length:
        raise OSError(f"{len(data)} bytes instead of {length}")
    return data


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
