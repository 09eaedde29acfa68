"""The work of ``catinfer``: from a generator and seeds to image files."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, repeat, starmap
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from catgan.command import STDOUT, UserError, say
from catgan.files import atomic_open
from infer.files import encode_all, make_writable, save
from infer.grid import cell, grid, grid_shape
from infer.output import Array, Files, Output, Shards, Sheet, check_shards
from infer.points import Points, open_points
from infer.provenance import Provenance, this_software
from infer.session import Generator
from infer.walk import STEPS, check_walk, write_walk

MAX_SHEET_SIDE = 16383  # pixels; WebP's limit, and about 1 GB in memory
# At most so many images, and so many bytes, are in memory at a time. Does not affect the images.
CHUNK = 64
CHUNK_BYTES = 2**28
REPORT_SECONDS = 2.0
CONTACTS = 64  # images on the contact sheet of a data set

_Chunk: TypeAlias = tuple[np.ndarray, float, np.ndarray]  # z, psi and move, see Generator


@dataclass(frozen=True)
class Order:
    """What ``catinfer`` generates.

    Attributes:
        onnx: the generator's file.
        seeds: one per image, in order, all different, at least one.
        psi: truncation, see ``Generator``.
        output: where the images go; None to write ``interpolate`` alone.
        interpolate: a file for a walk through the seeds.
        device: see ``Generator``.
        metadata: whether the files say that they are generated, and by what, see ``infer.provenance``.
        latents: files with latents, see ``infer.latentfile``, instead of ``seeds``.
        directions: {number of a direction from 1 on: multiple} to move all latents by, see ``infer.directions``.
    """

    onnx: str
    seeds: Sequence[int]
    psi: float = 1.0
    output: Output | None = None
    interpolate: str | None = None
    device: str = "auto"
    metadata: bool = True
    latents: Sequence[str] = ()
    directions: Mapping[int, float] = field(default_factory=dict)


def generate(order: Order) -> dict[str, Any]:
    """Write the files of ``order``. Returns the JSON object of ``catinfer``.

    Names and folders are checked before anything is generated.

    Raises:
        UserError: a file cannot be read or written, does not fit its format, or is not a generator.
    """
    start = time.perf_counter()
    try:
        generator, points, labels = _prepare(order)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    match order.output:
        case Sheet() as sheet:
            _write_sheet(sheet, labels, order, points, generator)
        case Array() as array:
            _write_array(array, order, points, generator)
        case Files() | Shards() as folder:
            _write_many(folder, order, points, generator)
    if order.interpolate is not None:
        path = points.walk(STEPS)
        chunk = _chunk(generator)
        chunks = ((path[i : i + chunk], order.psi, points.move) for i in range(0, len(path), chunk))
        xmp = _origin(order, generator, "walk").packet() if order.metadata else None
        write_walk(Path(order.interpolate), _images(generator, chunks, len(path)), xmp)
    out = order.output.out if order.output else order.interpolate
    result: dict[str, Any] = {"out": out, "n": len(points), "provider": generator.provider}
    if order.interpolate is not None:
        result["interpolate"] = order.interpolate
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _prepare(order: Order) -> tuple[Generator, Points, list[str]]:
    """Check the order, open the generator and make the folders. Returns also the latents and a sheet's labels."""
    if order.interpolate is not None:
        check_walk(order.interpolate, len(order.latents or order.seeds))
    if order.latents and isinstance(order.output, Files | Shards):
        raise UserError(
            f"--latent: single files are named by seed; give one sheet or array, such as --out cats.png; --out is "
            f"{order.output.out}"
        )
    if isinstance(order.output, Shards):
        check_shards(Path(order.output.out))
    generator = Generator(order.onnx, order.device)
    points = open_points(generator, order.onnx, order.seeds, order.latents, order.directions)
    labels = _sheet_labels(order.output, points.names, generator.size) if isinstance(order.output, Sheet) else []
    match order.output:
        case Sheet(out) | Array(out) if out != STDOUT:
            make_writable(Path(out).parent)
        case Files(out) | Shards(out):
            make_writable(Path(out))
    if order.interpolate is not None:
        make_writable(Path(order.interpolate).parent)
    return generator, points, labels


def _sheet_labels(sheet: Sheet, seeds: Sequence[int] | Sequence[str], size: int) -> list[str]:
    """The text below each image of ``size`` pixels, if any. Raises ``UserError`` if the sheet would be too large."""
    n = len(seeds)
    rows, columns = (len(sheet.sweep), n) if sheet.sweep else grid_shape(n)
    labels = ["0"] if sheet.labels else []
    width, height = cell(size, labels)
    if sheet.labels and max(columns * width, rows * height) <= MAX_SHEET_SIDE:
        labels = [f"{seed}, psi {psi:g}" for psi in sheet.sweep for seed in seeds] or list(map(str, seeds))
        width, height = cell(size, labels)
    if max(columns * width, rows * height) > MAX_SHEET_SIDE:
        most = MAX_SHEET_SIDE // width if sheet.sweep else (MAX_SHEET_SIDE // max(width, height)) ** 2
        raise UserError(
            f"--n {n}: one sheet of {rows} x {columns} images of {size}x{size} would be {columns * width}x"
            f"{rows * height} pixels, more than {MAX_SHEET_SIDE} a side; use at most --n {most}, or --out DIR/ for "
            "files"
        )
    return labels


def _chunk(generator: Generator) -> int:
    """The number of images in memory at a time."""
    return max(1, min(CHUNK, CHUNK_BYTES // (3 * generator.size**2)))


def _chunks(points: Points, psis: Sequence[float], generator: Generator) -> Iterator[_Chunk]:
    """All latents for each psi, at most ``_chunk(generator)`` at a time."""
    chunk = _chunk(generator)
    for psi in psis:
        for first in range(0, len(points), chunk):
            yield points[first : first + chunk].latents(), psi, points.move


def _images(generator: Generator, chunks: Iterable[_Chunk], total: int, before: int = 0) -> Iterator[np.ndarray]:
    """Each image uint8 ``[size, size, 3]`` of all chunks. Reports progress every few seconds.

    ``before`` of the ``total`` images were generated by an earlier process.
    """
    done, start = before, time.perf_counter()
    reported = start
    for chunk in chunks:
        yield from generator(*chunk)
        done, now = done + len(chunk[0]), time.perf_counter()
        if now - reported >= REPORT_SECONDS and done < total:
            reported, speed = now, (done - before) / (now - start)
            minutes, seconds = divmod(round((total - done) / speed), 60)
            say(f"{done}/{total} images, {speed:.0f}/s, {minutes}:{seconds:02d} min left")


def _origin(order: Order, generator: Generator, kind: str) -> Provenance:
    """The origin of a file with all images of ``order``. Of latents from files, nothing is recorded."""
    seeds = () if order.latents else order.seeds
    return Provenance(kind, generator.sha256, seeds, (order.psi,), device=generator.device, directions=order.directions)


def _write_sheet(sheet: Sheet, labels: Sequence[str], order: Order, points: Points, generator: Generator) -> None:
    n, psis = len(points), sheet.sweep or [order.psi]
    images = _images(generator, _chunks(points, psis, generator), n * len(psis))
    image = grid(np.stack(list(images)), n if sheet.sweep else None, labels)
    origin = _origin(order, generator, "sweep" if sheet.sweep else "sheet")
    xmp = replace(origin, psi=psis, labels=sheet.labels).packet() if order.metadata else None
    with _open(sheet.out) as file:
        encoded = io.BytesIO()  # Pillow reports a closed pipe as an error of its encoder
        save(image, encoded, sheet.suffix, xmp)
        file.write(encoded.getbuffer())


def _write_array(array: Array, order: Order, points: Points, generator: Generator) -> None:
    n = len(points)
    images = _images(generator, _chunks(points, [order.psi], generator), n)
    with _open(array.out) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, generator.size, generator.size, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            file.write(image.tobytes())


@contextmanager
def _open(out: str) -> Iterator[BinaryIO]:
    """``atomic_open`` of the path ``out``, or standard output."""
    if out != STDOUT:
        with atomic_open(Path(out)) as file:
            yield file
        return
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"--out -: cannot be written ({error.strerror})") from error


def _write_many(output: Files | Shards, order: Order, points: Points, generator: Generator) -> None:
    """Write single files or shards. Continues where an earlier process stopped."""
    from infer import bulk  # hashes and tars, whose imports would slow down every small command

    folder = Path(output.out)
    job = bulk.Job(
        generator_sha256=generator.sha256,
        seeds=order.seeds,
        psi=order.psi,
        suffix=output.suffix if isinstance(output, Files) else ".png",
        provider=generator.provider,
        shards=isinstance(output, Shards),
        software=this_software() if order.metadata else None,
        directions=order.directions,
    )
    progress = bulk.Progress(folder, job)
    progress.begin()
    chunks = _chunks(points[progress.done :], [order.psi], generator)
    origin = _origin(order, generator, "image")
    packets = origin.packets(order.seeds[progress.done :]) if order.metadata else repeat(None)
    files = encode_all(_images(generator, chunks, len(order.seeds), progress.done), job.suffix, packets)
    if not job.shards:
        bulk.write_files(folder, job, files, progress)
        return
    contacts = chain.from_iterable(starmap(generator, _chunks(points[:CONTACTS], [order.psi], generator)))
    shown = order.seeds[:CONTACTS]
    xmp = replace(origin, kind="sheet", seeds=shown).packet() if order.metadata else None
    with atomic_open(folder / bulk.CONTACT) as file:
        save(grid(np.stack(list(contacts))), file, ".png", xmp)
    bulk.write_shards(folder, job, generator.size, files, progress)
