"""From the pixels of a request to the bytes of its answer, which are those that ``catinfer`` writes to a file."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np

from infer.classes import labels_of
from infer.files import ARRAY, encode, save
from infer.grid import grid
from infer.latents import latents, walk
from infer.provenance import Provenance
from infer.service.parameters import GRID, WALK, ImageRequest
from infer.session import Generator
from infer.walk import STEPS, write_walk


def points(request: ImageRequest, z_dim: int) -> np.ndarray:
    """The latents of all images of ``request``, float32 ``[request.images, z_dim]``, before truncation."""
    keys = latents(request.seeds, z_dim)
    return walk(keys, STEPS) if request.path == WALK else np.tile(keys, (len(request.rows) or 1, 1))


def labels(request: ImageRequest) -> np.ndarray:
    """The labels of all images of ``request``, int64 ``[request.images]``."""
    if request.rows:
        return np.repeat([one.label for one in request.rows], len(request.seeds))
    if request.path == WALK:
        return np.full(request.images, request.classes[0].label if request.classes else 0)
    return np.array(labels_of(request.seeds, request.classes), np.int64)


class Cancelled(Exception):
    """Nobody waits for the file any more."""


def origin(request: ImageRequest, generator: Generator) -> bytes:
    """The XMP packet of the file of ``request``, see ``infer.provenance``."""
    kind = {GRID: "sheet", WALK: "walk"}.get(request.path, "image")
    names = [one.name for one in request.classes]
    return Provenance(
        kind, generator.sha256, request.seeds, (request.psi,), device=generator.device, classes=names
    ).packet()


def encode_answer(request: ImageRequest, pixels: np.ndarray, xmp: bytes, cancelled: Event) -> bytes:
    """The file of ``request`` with ``pixels`` uint8 ``[request.images, size, size, 3]`` and the packet ``xmp``; all
    are encoded here.

    Raises:
        Cancelled: ``cancelled`` was set before the frames of a GIF were complete, which can take many seconds.
    """
    suffix = f".{request.format}"
    if request.path == WALK:
        # The writer needs a file with a name, which is gone after this.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"walk{suffix}")
            write_walk(path, _unless(cancelled, pixels), xmp)
            return path.read_bytes()
    if request.path == GRID and suffix != ARRAY:
        file = io.BytesIO()
        names = [one.name for one in request.rows]
        save(grid(pixels, len(request.seeds) if names else None, rows=names), file, suffix, xmp)
        return file.getvalue()
    return encode(pixels if request.path == GRID else pixels[0], suffix, xmp)


def _unless(cancelled: Event, frames: np.ndarray) -> Iterator[np.ndarray]:
    for frame in frames:
        if cancelled.is_set():
            raise Cancelled
        yield frame
