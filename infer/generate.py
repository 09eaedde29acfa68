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
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from catgan.command import STDOUT, UserError, say
from catgan.files import atomic_open, locked_folder
from infer.classes import Class, check_one, choose, class_of, listed
from infer.files import encode_all, make_writable, save
from infer.grid import cell, grid, grid_shape, margin
from infer.output import Array, Files, Output, Shards, Sheet, check_shards
from infer.points import Points, open_points
from infer.provenance import Provenance, this_software
from infer.session import Generator
from infer.walk import STEPS, check_walk, write_walk

if TYPE_CHECKING:  # imported where it is used
    from infer.bulk import Job, Progress

MAX_SHEET_SIDE = 16383  # pixels; WebP's limit, and about 1 GB in memory
# At most so many images, and so many bytes, are in memory at a time. Does not affect the images.
CHUNK = 64
CHUNK_BYTES = 2**28
REPORT_SECONDS = 2.0
CONTACTS = 64  # images on the contact sheet of a data set

_Chunk: TypeAlias = tuple[np.ndarray, float, np.ndarray, np.ndarray]  # z, psi, move and label, see Generator


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
        classes: texts that name classes, see ``infer.classes.choose``. A sheet has a row of all seeds for each class if
            there are several; otherwise the classes take turns with the seeds, see ``infer.classes.class_of``.
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
    classes: Sequence[str] = ()


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
        parts = (path[i : i + chunk] for i in range(0, len(path), chunk))
        label = points[:1].labels()
        chunks = ((part, order.psi, points.move, np.repeat(label, len(part))) for part in parts)
        xmp = _origin(order, generator, points, "walk").packet() if order.metadata else None
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
    classes = choose(generator.classes, order.classes, "--class")
    _check_classes(order, classes, generator.classes)
    points = open_points(generator, order.onnx, order.seeds, order.latents, order.directions, classes)
    labels = _sheet_labels(order.output, points, generator.size) if isinstance(order.output, Sheet) else []
    match order.output:
        case Sheet(out) | Array(out) if out != STDOUT:
            make_writable(Path(out).parent)
        case Files(out) | Shards(out):
            make_writable(Path(out))
    if order.interpolate is not None:
        make_writable(Path(order.interpolate).parent)
    return generator, points, labels


def _check_classes(order: Order, classes: Sequence[Class], names: Sequence[str]) -> None:
    """Raise ``UserError`` if several classes are chosen for what shows one; say which there are if none was given."""
    sweep = isinstance(order.output, Sheet) and order.output.sweep
    for is_given, what in (
        (order.interpolate is not None, "--interpolate"),
        (sweep, "--truncation-sweep"),
        (order.latents and not isinstance(order.output, Sheet), "--latent with one array"),
    ):
        if is_given:
            check_one(classes, names, "--class NAME", what)
    if len(classes) > 1 and not order.classes:
        say(f"{len(names)} classes, which --class chooses: {listed(names)}")


def _row_names(points: Points, sheet: Sheet) -> list[str]:
    """The classes of a sheet that has a row for each of several; else none."""
    return [one.name for one in points.classes] if len(points.classes) > 1 and not sheet.sweep else []


def _sheet_labels(sheet: Sheet, points: Points, size: int) -> list[str]:
    """The text below each image of ``size`` pixels, if any. Raises ``UserError`` if the sheet would be too large."""
    seeds, names = points.names, _row_names(points, sheet)
    n = len(seeds)
    has_rows = bool(sheet.sweep or names)
    rows, columns = (len(sheet.sweep or names), n) if has_rows else grid_shape(n)
    beside = margin(size, names)
    labels = ["0"] if sheet.labels else []
    width, height = cell(size, labels)
    if sheet.labels and max(beside + columns * width, rows * height) <= MAX_SHEET_SIDE:
        labels = [f"{seed}, psi {psi:g}" for psi in sheet.sweep for seed in seeds]
        labels = labels or [str(seed) for _ in names or [""] for seed in seeds]
        width, height = cell(size, labels)
    full = (beside + columns * width, rows * height)
    if max(full) > MAX_SHEET_SIDE:
        most = (MAX_SHEET_SIDE - beside) // width if has_rows else (MAX_SHEET_SIDE // max(width, height)) ** 2
        fewer = "fewer classes with --class" if full[1] > MAX_SHEET_SIDE and names else f"at most --n {most}"
        raise UserError(
            f"--n {n}: one sheet of {rows} x {columns} images of {size}x{size} would be {full[0]}x{full[1]} pixels, "
            f"more than {MAX_SHEET_SIDE} a side; use {fewer}, or --out DIR/ for files"
        )
    return labels


def _chunk(generator: Generator) -> int:
    """The number of images in memory at a time."""
    return max(1, min(CHUNK, CHUNK_BYTES // (3 * generator.size**2)))


def _chunks(rows: Iterable[tuple[Points, float]], generator: Generator) -> Iterator[_Chunk]:
    """All points of each row with its psi, at most ``_chunk(generator)`` at a time."""
    chunk = _chunk(generator)
    for points, psi in rows:
        for first in range(0, len(points), chunk):
            part = points[first : first + chunk]
            yield part.latents(), psi, points.move, part.labels()


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


def _origin(order: Order, generator: Generator, points: Points, kind: str) -> Provenance:
    """The origin of a file with all images of ``order``. Of latents from files, nothing is recorded."""
    return Provenance(
        kind,
        generator.sha256,
        () if order.latents else order.seeds,
        (order.psi,),
        device=generator.device,
        directions=order.directions,
        classes=[one.name for one in points.classes],
    )


def _write_sheet(sheet: Sheet, labels: Sequence[str], order: Order, points: Points, generator: Generator) -> None:
    psis, names = sheet.sweep or [order.psi], _row_names(points, sheet)
    rows = [(points.of(one), order.psi) for one in points.classes] if names else [(points, psi) for psi in psis]
    images = _images(generator, _chunks(rows, generator), len(points) * len(rows))
    pixels = np.empty((len(points) * len(rows), generator.size, generator.size, 3), np.uint8)
    for i, image in enumerate(images):
        pixels[i] = image
    sheet_image = grid(pixels, len(points) if sheet.sweep or names else None, labels, names)
    origin = _origin(order, generator, points, "sweep" if sheet.sweep else "sheet")
    xmp = replace(origin, psi=psis, labels=sheet.labels).packet() if order.metadata else None
    with _open(sheet.out) as file:
        encoded = io.BytesIO()  # Pillow reports a closed pipe as an error of its encoder
        save(sheet_image, encoded, sheet.suffix, xmp)
        file.write(encoded.getbuffer())


def _write_array(array: Array, order: Order, points: Points, generator: Generator) -> None:
    n = len(points)
    images = _images(generator, _chunks([(points, order.psi)], generator), n)
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
        classes=points.classes,
    )
    with locked_folder(folder):
        if job.shards:
            check_shards(folder)  # again: another process may have finished since the first time
        _continue(bulk.Progress(folder, job), job, order, points, generator)


def _continue(progress: Progress, job: Job, order: Order, points: Points, generator: Generator) -> None:
    """Write what is left of the job."""
    from infer import bulk

    folder = progress.folder
    progress.begin()
    chunks = _chunks([(points[progress.done :], order.psi)], generator)
    origin = _origin(order, generator, points, "image")
    left = order.seeds[progress.done :]
    classes = (() if one is None else (one.name,) for one in (class_of(seed, points.classes) for seed in left))
    packets = origin.packets(left, classes) if order.metadata else repeat(None)
    files = encode_all(_images(generator, chunks, len(order.seeds), progress.done), job.suffix, packets)
    if not job.shards:
        bulk.write_files(folder, job, files, progress)
        return
    contacts = chain.from_iterable(starmap(generator, _chunks([(points[:CONTACTS], order.psi)], generator)))
    # No command makes a sheet on which classes take turns.
    shown = order.seeds[:CONTACTS] if len(points.classes) <= 1 else ()
    xmp = replace(origin, kind="sheet", seeds=shown).packet() if order.metadata else None
    with atomic_open(folder / bulk.CONTACT) as file:
        save(grid(np.stack(list(contacts))), file, ".png", xmp)
    bulk.write_shards(folder, job, generator.size, files, progress, generator.classes)
