"""Writes a walk through the latents of several seeds as an endless GIF or WebP or as an MP4."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from catgan.command import UserError
from catgan.files import atomic_open
from infer.containers import gif_with_xmp, mp4_box

SUFFIXES = (".gif", ".webp", ".mp4")
STEPS = 20  # frames from one seed to the next
FRAME_MS = 50
MAX_SEEDS = 200  # Pillow holds all frames of a GIF or WebP until it is written


def check_walk(path: str, seeds: int) -> None:
    """Raise ``UserError`` for a name or a number of seeds that ``write_walk`` does not accept."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"--interpolate {path}: the walk is a video; give a name that ends with .gif, .webp or .mp4")
    if Path(path).is_dir():
        raise UserError(f"--interpolate {path}: is a directory; choose another name")
    if not 2 <= seeds <= MAX_SEEDS:
        raise UserError(f"--interpolate {path}: walks through 2 to {MAX_SEEDS} seeds, {seeds} given")
    if suffix == ".mp4":
        _import_av(path)


def write_walk(path: Path, frames: Iterator[np.ndarray], xmp: bytes | None = None) -> None:
    """Write ``frames``, at least one, uint8 ``[size, size, 3]`` each, in the format of ``path``'s suffix, with the XMP
    packet ``xmp``."""
    with atomic_open(path) as file:
        match path.suffix.lower():
            case ".gif":
                _write_gif(file, frames, xmp)
            case ".webp":
                _write_webp(file, frames, xmp)
            case _:
                _write_mp4(file, frames, str(path))
                if xmp is not None:
                    file.seek(0, os.SEEK_END)
                    file.write(mp4_box(xmp))


def _write_gif(file: BinaryIO, frames: Iterator[np.ndarray], xmp: bytes | None) -> None:
    # Each frame gets its own palette of 256 colours, without dithering, whose noise would change from frame to frame.
    images = (Image.fromarray(f).quantize(256, dither=Image.Dither.NONE) for f in frames)
    gif = io.BytesIO()
    next(images).save(gif, "GIF", save_all=True, append_images=images, duration=FRAME_MS, loop=0)
    file.write(gif.getvalue() if xmp is None else gif_with_xmp(gif.getvalue(), xmp))


def _write_webp(file: BinaryIO, frames: Iterator[np.ndarray], xmp: bytes | None) -> None:
    images = map(Image.fromarray, frames)
    options: dict[str, Any] = {"duration": FRAME_MS, "loop": 0, "lossless": True}
    if xmp is not None:
        options["xmp"] = xmp
    next(images).save(file, "WEBP", save_all=True, append_images=list(images), **options)


def _write_mp4(file: BinaryIO, frames: Iterable[np.ndarray], name: str) -> None:
    """H.264 with half the colour resolution (yuv420p), the format that all browsers and phones play."""
    av = _import_av(name)
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    even = [(0, height % 2), (0, width % 2), (0, 0)]  # yuv420p needs even sides
    with av.open(file, "w", format="mp4", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("libx264", rate=1000 // FRAME_MS, options={"crf": "15"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for pixels in itertools.chain([first], frames):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.pad(pixels, even, "edge"), format="rgb24")))
        video.mux(stream.encode())


def _import_av(name: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"--interpolate {name}: MP4 needs PyAV, which brings its own encoder: pip install 'catgan[video]'; "
            "or give a name that ends with .gif or .webp"
        ) from error
    return av
