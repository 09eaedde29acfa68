"""Reading whole shards from disk, a bucket or a web server, and the encoded images in them.

Shards are read completely before their first sample is used, so a failed download can be retried without repeating
samples.
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
from catgan.dataset import Manifest, Shard
from catgan.files import atomic_write
from catgan.location import is_url, join, read
from catgan.text import printable
from trainer.data.tars import StrictInfo

T = TypeVar("T")

IMAGE_SUFFIXES = (".webp", ".png")
_TRIES = 8  # bridges an outage of half a minute or more: skipping a shard costs training its images
_AHEAD = 2  # shards downloaded while an earlier one is used


def shard_bytes(manifest: Manifest, shard: Shard) -> bytes:
    """The content of a shard. Downloads are compared with the shard's SHA-256 and kept in ``manifest.cache``.

    Raises:
        OSError: the shard cannot be read in spite of retries, or has another SHA-256.
    """
    location = join(manifest.root, shard.name)
    if not is_url(location):
        return read(location)
    cached = Path(manifest.cache, f"{shard.sha256}.tar") if manifest.cache else None
    if cached and cached.is_file() and _is_intact(data := cached.read_bytes(), shard):
        return data
    data = read(location, shard.bytes, _TRIES)
    if not _is_intact(data, shard):
        raise OSError("its sha256 is not the manifest's")
    if cached:
        _store(data, cached)
    return data


def _is_intact(data: bytes, shard: Shard) -> bool:
    return hashlib.sha256(data).hexdigest() == shard.sha256


def _store(data: bytes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data, durable=False)  # its hash is checked when it is read
    except OSError as error:  # training can continue without a cache
        say(f"cannot cache {path}: {error}; this shard will be downloaded again")


def shards_ahead(manifest: Manifest, shards: Iterable[Shard | None]) -> Iterator[bytes | OSError]:
    """The content of each shard, in order, or the error of reading it; None gives ``b""``.

    Remote shards are downloaded in threads, up to two ahead of the caller.
    """

    def content(shard: Shard | None) -> bytes | OSError:
        try:
            return shard_bytes(manifest, shard) if shard else b""
        except OSError as error:
            return error

    if not is_url(manifest.root):
        yield from map(content, shards)
        return
    downloads: collections.deque[queue.SimpleQueue[bytes | OSError]] = collections.deque()
    for shard in shards:
        downloads.append(_in_thread(partial(content, shard)))
        if len(downloads) > _AHEAD:
            yield downloads.popleft().get()
    while downloads:
        yield downloads.popleft().get()


def _in_thread(action: Callable[[], T]) -> queue.SimpleQueue[T]:
    """Call ``action`` in a daemon thread; the queue receives its result.

    Not a ThreadPoolExecutor: the interpreter joins the threads of a pool at exit, so Ctrl-C would wait for downloads.
    """
    result: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: result.put(action()), daemon=True).start()
    return result


def class_number(content: bytes, num_classes: int) -> int:
    """The number in a sample's ``.cls``.

    Raises:
        ValueError: it is not a number of one of the classes.
    """
    text = content[:20].decode("ascii", "replace")
    if not (text.isdecimal() and int(text) < num_classes):
        raise ValueError(f"class {printable(text)!r}, not a number from 0 to {num_classes - 1}")
    return int(text)


def labelled_images(shard: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The encoded images in the content of a shard, in order, each with the content of its ``.cls``, which follows it;
    empty if it has none.

    Raises:
        tarfile.TarError: the tar is truncated or damaged.
    """
    image: bytes | None = None
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:", tarinfo=StrictInfo) as tar:
        for info in tar:
            if not info.isreg() or not info.name.endswith((*IMAGE_SUFFIXES, ".cls")):
                continue
            content = shard[info.offset_data : info.offset_data + info.size]
            if not info.name.endswith(".cls"):
                if image is not None:
                    yield image, b""
                image = content
            elif image is not None:
                yield image, content
                image = None
        if image is not None:
            yield image, b""


def encoded_images(shard: bytes) -> Iterator[bytes]:
    """The encoded images in the content of a shard, in order. Other files in the tar are skipped.

    Raises:
        tarfile.TarError: the tar is truncated or damaged.
    """
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:", tarinfo=StrictInfo) as tar:
        for info in tar:
            if info.isreg() and info.name.endswith(IMAGE_SUFFIXES):
                yield shard[info.offset_data : info.offset_data + info.size]
