"""The work of ``catinfer``: from a generator and seeds to files of pictures."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from infer.command import UserError, say
from infer.grid import grid, grid_shape
from infer.latents import latents, walk
from infer.session import Generator

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SHEET_SIDE = 16383  # pixels; WebP's limit, and about 1 GB in memory
MAX_WALK = 200  # seeds; Pillow holds all frames of a GIF until it is written
STEPS = 20  # frames from one seed of a walk to the next
FRAME_MS = 50
CHUNK = 32  # pictures in memory at a time; changes nothing about them
REPORT_SECONDS = 2.0


def generate(
    onnx: str, n: int, seed: int, psi: float, out: str | None, interpolate: str | None, device: str
) -> dict[str, Any]:
    """Write pictures of the seeds ``seed`` to ``seed + n - 1`` and return what ``catinfer`` prints as JSON.

    ``psi`` scales the latents; there is no mapping network with a mean latent to truncate towards. ``out`` is a file
    for one sheet or a directory for single files, ``interpolate`` a GIF; either may be None. Names and folders are
    checked before anything is generated. Raises ``UserError``.
    """
    start = time.perf_counter()
    try:
        as_sheet = out is not None and _is_sheet(out)
        if interpolate is not None:
            _check_walk(interpolate, n)
        generator = Generator(onnx, device)
        if as_sheet:
            _check_sheet_size(n, generator.size)
        if out is not None:
            _make_writable(Path(out).parent if as_sheet else Path(out))
        if interpolate is not None:
            _make_writable(Path(interpolate).parent)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    if out is not None:
        pictures = _pictures(generator, _by_seed(seed, n, generator.z_dim), psi, n)
        if as_sheet:
            _write_sheet(Path(out), pictures)
        else:
            _write_files(Path(out), pictures, seed)
    if interpolate is not None:
        points = walk(latents(range(seed, seed + n), generator.z_dim), STEPS)
        chunks = (points[i : i + CHUNK] for i in range(0, len(points), CHUNK))
        _write_walk(Path(interpolate), _pictures(generator, chunks, psi, len(points)))
    result = {"out": out or interpolate, "n": n, "provider": generator.provider}
    if interpolate is not None:
        result["interpolate"] = interpolate
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _is_sheet(out: str) -> bool:
    """Whether ``out`` names one picture file rather than a directory; ``UserError`` where it fits neither."""
    path, named_directory = Path(out), out.endswith(("/", os.sep))
    wanted = "one sheet ends with .png, .jpg, .jpeg or .webp; for single files name a directory, ending with /"
    if not out:
        raise UserError(f"--out is empty: {wanted}")
    if path.is_dir() and path.suffix.lower() in FORMATS and not named_directory:
        raise UserError(f"--out {out}: is a directory; add / for single files in it, or choose another name")
    if path.is_dir() or named_directory:
        return False
    if path.suffix.lower() in FORMATS:
        return True
    if path.suffix or path.exists():
        raise UserError(f"--out {out}: {wanted}")
    return False


def _check_walk(interpolate: str, n: int) -> None:
    suffix = Path(interpolate).suffix.lower()
    if suffix == ".mp4":
        raise UserError(f"--interpolate {interpolate}: MP4 is not written yet; give a name that ends with .gif")
    if suffix != ".gif":
        raise UserError(f"--interpolate {interpolate}: the walk is a GIF; give a name that ends with .gif")
    if Path(interpolate).is_dir():
        raise UserError(f"--interpolate {interpolate}: is a directory; choose another name")
    if not 2 <= n <= MAX_WALK:
        raise UserError(f"--n {n}: --interpolate walks through 2 to {MAX_WALK} seeds")


def _check_sheet_size(n: int, size: int) -> None:
    rows, columns = grid_shape(n)
    if max(rows, columns) * size > MAX_SHEET_SIDE:
        raise UserError(
            f"--n {n}: one sheet of {n} pictures of {size}x{size} would be {columns * size}x{rows * size} pixels, more "
            f"than {MAX_SHEET_SIDE} a side; use at most --n {(MAX_SHEET_SIDE // size) ** 2}, or --out DIR/ for files"
        )


def _make_writable(folder: Path) -> None:
    """Make ``folder`` where missing and prove that files can be created in it; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _by_seed(seed: int, n: int, z_dim: int) -> Iterator[np.ndarray]:
    """The latents of the seeds ``seed`` to ``seed + n - 1``, a chunk at a time: float32 ``[<= CHUNK, z_dim]``."""
    for first in range(seed, seed + n, CHUNK):
        yield latents(range(first, min(first + CHUNK, seed + n)), z_dim)


def _pictures(generator: Generator, chunks: Iterable[np.ndarray], psi: float, total: int) -> Iterator[np.ndarray]:
    """Each picture uint8 ``[size, size, 3]`` of all chunks; says how far it is every few seconds."""
    done, start = 0, time.perf_counter()
    reported = start
    for z in chunks:
        yield from generator(z * np.float32(psi))
        done, now = done + len(z), time.perf_counter()
        if now - reported >= REPORT_SECONDS and done < total:
            reported, speed = now, done / (now - start)
            say(f"{done}/{total} pictures, {speed:.0f}/s, {(total - done) / speed:.0f} s left")


def _write_sheet(path: Path, pictures: Iterator[np.ndarray]) -> None:
    sheet = grid(np.stack(list(pictures)))
    with _beside(path) as file:
        sheet.save(file, FORMATS[path.suffix.lower()], quality=95)


def _write_files(folder: Path, pictures: Iterator[np.ndarray], seed: int) -> None:
    for i, picture in enumerate(pictures, seed):
        with _beside(folder / f"cat-{i:06d}.png") as file:
            Image.fromarray(picture).save(file, "PNG")


def _write_walk(path: Path, pictures: Iterator[np.ndarray]) -> None:
    # Each frame gets its own palette of 256 colours; without dithering, whose noise would crawl from frame to frame.
    frames = (Image.fromarray(p).quantize(256, dither=Image.Dither.NONE) for p in pictures)
    first = next(frames)
    with _beside(path) as file:
        first.save(file, "GIF", save_all=True, append_images=frames, duration=FRAME_MS, loop=0)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[BinaryIO]:
    """A file in ``target``'s folder that becomes ``target`` when the block ends well, and vanishes when it does not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
