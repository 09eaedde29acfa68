"""Image files: formats by suffix, and encoding in threads."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from catgan.machine import cores
from infer.containers import PNG_XMP

ARRAY = ".npy"
STATE = ".catinfer.json"  # the state file in a folder of unfinished work, see bulk
# JPEG without chroma subsampling: at 64 pixels its blur is visible. method 4 is libwebp's default effort.
_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True, "method": 4},
}
SUFFIXES = (*_OPTIONS, ARRAY)
# At most so many images, and so many bytes, wait to be encoded or written.
_AHEAD = 64
_AHEAD_BYTES = 2**28


def save(image: Image.Image, file: BinaryIO, suffix: str, xmp: bytes | None = None) -> None:
    """Write ``image`` in the format of ``suffix``, with the XMP packet ``xmp``. PNG and WebP are lossless."""
    options = dict(_OPTIONS[suffix])
    if xmp is not None and options["format"] == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add(b"iTXt", PNG_XMP + xmp)
    elif xmp is not None:
        options["xmp"] = xmp
    image.save(file, **options)


def load(path: Path) -> Image.Image:
    """The image in a file, as RGB, with what it says about its origin in ``info``.

    Raises:
        ValueError: it cannot be read, is damaged, or has more pixels than Pillow allows.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises all three
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def encode(pixels: np.ndarray, suffix: str, xmp: bytes | None = None) -> bytes:
    """The content of a file with ``pixels`` uint8 ``[H, W, 3]``.

    Args:
        suffix: one of ``SUFFIXES``.
        xmp: the packet of ``Provenance``, for the file to say that it is generated; a ``.npy`` has no place for it.
    """
    file = io.BytesIO()
    if suffix == ARRAY:
        np.save(file, pixels, allow_pickle=False)
    else:
        save(Image.fromarray(pixels), file, suffix, xmp)
    return file.getvalue()


def encode_all(
    images: Iterable[np.ndarray], suffix: str, packets: Iterable[bytes | None] = repeat(None)
) -> Iterator[bytes]:
    """``encode`` of each image with its packet, in order, in one thread per core while further images are generated."""
    with ThreadPoolExecutor(cores()) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for pixels, xmp in zip(images, packets, strict=False):
                waiting.append(pool.submit(encode, pixels, suffix, xmp))
                if len(waiting) > min(_AHEAD, _AHEAD_BYTES // pixels.nbytes):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def make_writable(folder: Path) -> None:
    """Make ``folder`` if it is missing, and check that files can be created in it. Raises OSError about ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
