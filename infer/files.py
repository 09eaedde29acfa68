"""Picture files: formats by suffix, encoding in threads, and writing beside a name before taking it."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from catgan.command import UserError
from catgan.machine import cores

ARRAY = ".npy"
STATE = ".catinfer.json"  # in a folder with unfinished work, see bulk
# JPEG without chroma subsampling: at 64 pixels a blurred colour is seen. method 4 is libwebp's default effort.
_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True, "method": 4},
}
SUFFIXES = (*_OPTIONS, ARRAY)
# What may wait to be encoded or written, pictures and bytes; bounds the memory.
_AHEAD = 64
_AHEAD_BYTES = 2**28


def save(picture: Image.Image, file: BinaryIO, suffix: str) -> None:
    """Write ``picture`` in the format of ``suffix``: PNG and WebP keep every pixel, JPEG nearly."""
    picture.save(file, **_OPTIONS[suffix])


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    """The bytes of a file with ``pixels`` uint8 ``[H, W, 3]``, one of ``SUFFIXES``."""
    file = io.BytesIO()
    if suffix == ARRAY:
        np.save(file, pixels, allow_pickle=False)
    else:
        save(Image.fromarray(pixels), file, suffix)
    return file.getvalue()


def encoded(pictures: Iterable[np.ndarray], suffix: str) -> Iterator[bytes]:
    """``encode`` of each picture, in order, by a thread for each core while the next pictures are made."""
    with ThreadPoolExecutor(cores()) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for pixels in pictures:
                waiting.append(pool.submit(encode, pixels, suffix))
                if len(waiting) > min(_AHEAD, _AHEAD_BYTES // pixels.nbytes):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def make_writable(folder: Path) -> None:
    """Make ``folder`` where missing and prove that files can be created in it; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_shards(folder: Path) -> None:
    """A ``UserError`` unless ``folder`` is missing, empty, or holds unfinished work; raises OSError."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file():
        raise UserError(f"--out {folder}: is not empty; shards need a folder of their own")
