"""Whole shards, from wherever they lie, and the encoded pictures in them.

A shard is read in one piece: a download that breaks off is tried again before any of its samples is seen, and a
picture is a slice of memory.
"""

from __future__ import annotations

import collections
import hashlib
import io
import queue
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from catgan.command import say
from catgan.files import atomic_write
from catgan.location import is_url, join, read
from trainer.data.manifest import Manifest, Shard
from trainer.data.tars import StrictInfo

T = TypeVar("T")

_TRIES = 8  # a minute's outage should not cost a training its pictures
_AHEAD = 2  # shards that are read while the one before is used

PICTURES = (".webp", ".png")


def shard_bytes(manifest: Manifest, shard: Shard) -> bytes:
    """The content of a shard. One from elsewhere is compared with its SHA-256, and kept in ``manifest.cache``.

    Raises:
        OSError: it cannot be read, or is not what the manifest says, also after some tries.
    """
    path = join(manifest.root, shard.name)
    if not is_url(path):
        return read(path)
    kept = Path(manifest.cache, f"{shard.sha256}.tar") if manifest.cache else None
    if kept and kept.is_file() and _is_whole(data := kept.read_bytes(), shard):
        return data
    data = read(path, shard.bytes, _TRIES)
    if not _is_whole(data, shard):
        raise OSError("its sha256 is not the manifest's")
    if kept:
        _keep(data, kept)
    return data


def _is_whole(data: bytes, shard: Shard) -> bool:
    return hashlib.sha256(data).hexdigest() == shard.sha256


def _keep(data: bytes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:  # a full disk is no reason to stop a training that can go on without
        say(f"cannot keep {path}: {error}; it will be read from its source again")


def shards_ahead(manifest: Manifest, shards: Iterable[Shard | None]) -> Iterator[bytes | OSError]:
    """The contents of shards in order, or why there is none; the next ones are read meanwhile. None gives ``b""``."""

    def content(shard: Shard | None) -> bytes | OSError:
        try:
            return shard_bytes(manifest, shard) if shard else b""
        except OSError as error:
            return error

    if not is_url(manifest.root):
        yield from map(content, shards)
        return
    reading: collections.deque[queue.SimpleQueue[bytes | OSError]] = collections.deque()
    for shard in shards:
        reading.append(_in_thread(partial(content, shard)))
        if len(reading) > _AHEAD:
            yield reading.popleft().get()
    while reading:
        yield reading.popleft().get()


def _in_thread(action: Callable[[], T]) -> queue.SimpleQueue[T]:
    """Where the result of ``action`` will be. Not a pool: the interpreter waits for its threads, Ctrl-C or not."""
    result: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: result.put(action()), daemon=True).start()
    return result


def pictures(shard: bytes) -> Iterator[bytes]:
    """The encoded pictures of a shard, in order. Whatever else is in it is passed over.

    Raises:
        tarfile.TarError: the tar breaks off.
    """
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:", tarinfo=StrictInfo) as tar:
        for info in tar:
            if info.isreg() and info.name.endswith(PICTURES):
                yield shard[info.offset_data : info.offset_data + info.size]
