"""The work of ``catinfer``: from a generator and seeds to files of pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from catgan.command import UserError, say
from catgan.files import atomic_open
from infer.files import ARRAY, SUFFIXES, check_shards, encoded, make_writable, save
from infer.grid import cell, grid, grid_shape
from infer.latents import latents, walk
from infer.session import Generator
from infer.walk import STEPS, check_walk, write_walk

MAX_SHEET_SIDE = 16383  # pixels; WebP's limit, and about 1 GB in memory
# In memory at a time, at most so many pictures and bytes; changes nothing about the pictures.
CHUNK = 64
CHUNK_BYTES = 2**28
REPORT_SECONDS = 2.0
CONTACTS = 64  # pictures of a data set that its contact sheet shows


class Order(NamedTuple):
    """What ``catinfer`` is asked for.

    Attributes:
        onnx: the generator's file.
        seeds: of the pictures, in order, no two alike, at least one.
        psi: scales the latents; there is no mapping network with a mean latent to truncate towards.
        out: a file for all pictures, or a directory; None for no pictures but those of ``interpolate``.
        suffix: of single files, such as ".png"; None takes that, and is needed where ``out`` is a file.
        shards: ``out`` becomes a data set instead of single files.
        labels: seeds stand under the pictures of a sheet.
        sweep: values of psi, one row of the sheet for each; none for the one ``psi``.
        interpolate: a file for a walk through the seeds.
        device: see ``Generator``.
    """

    onnx: str
    seeds: Sequence[int]
    psi: float = 1.0
    out: str | None = None
    suffix: str | None = None
    shards: bool = False
    labels: bool = False
    sweep: Sequence[float] = ()
    interpolate: str | None = None
    device: str = "auto"


def generate(order: Order) -> dict[str, Any]:
    """Write what is ordered and return what ``catinfer`` prints as JSON.

    Names and folders are checked before anything is generated. Raises ``UserError``.
    """
    start = time.perf_counter()
    path = Path(order.out) if order.out is not None else None
    try:
        one_file = order.out is not None and _is_one_file(order.out)
        _check_options(order, one_file)
        if order.interpolate is not None:
            check_walk(order.interpolate, len(order.seeds))
        if path and order.shards:
            check_shards(path)
        generator = Generator(order.onnx, order.device)
        labels = _labels(order, generator.size) if one_file else []
        if path:
            make_writable(path.parent if one_file else path)
        if order.interpolate is not None:
            make_writable(Path(order.interpolate).parent)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    if path and one_file:
        _write_one_file(path, order, generator, labels)
    elif path:
        _write_many(path, order, generator)
    if order.interpolate is not None:
        points = walk(latents(order.seeds, generator.z_dim), STEPS) * np.float32(order.psi)
        chunk = _chunk(generator)
        chunks = (points[i : i + chunk] for i in range(0, len(points), chunk))
        write_walk(Path(order.interpolate), _pictures(generator, chunks, len(points)))
    result = {"out": order.out or order.interpolate, "n": len(order.seeds), "provider": generator.provider}
    if order.interpolate is not None:
        result["interpolate"] = order.interpolate
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _is_one_file(out: str) -> bool:
    """Whether ``out`` names one file for all pictures rather than a directory; ``UserError`` where it fits neither."""
    path, named_directory = Path(out), out.endswith(("/", os.sep))
    wanted = (
        "one sheet ends with .png, .jpg, .jpeg or .webp, one array with .npy; "
        "for single files name a directory, ending with /"
    )
    if not out:
        raise UserError(f"--out is empty: {wanted}")
    if path.is_dir() and path.suffix.lower() in SUFFIXES and not named_directory:
        raise UserError(f"--out {out}: is a directory; add / for single files in it, or choose another name")
    if path.is_dir() or named_directory:
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix or path.exists():
        raise UserError(f"--out {out}: {wanted}")
    return False


def _check_options(order: Order, one_file: bool) -> None:
    """``UserError`` for options that the kind of ``out`` has no use for."""
    sheet = one_file and Path(str(order.out)).suffix.lower() != ARRAY
    for given, fits, what in (
        (order.suffix is not None, order.out is not None and not one_file, "--format needs --out DIR/"),
        (order.shards, order.out is not None and not one_file, "--shards needs --out DIR/"),
        (order.shards, order.suffix in (None, ".png"), "--shards holds PNG: leave --format away"),
        (order.labels, sheet, "--labels needs a sheet, such as --out cats.png"),
        (bool(order.sweep), sheet, "--truncation-sweep needs a sheet, such as --out cats.png"),
    ):
        if given and not fits:
            raise UserError(what + (f"; --out is {order.out}" if order.out else ""))


def _labels(order: Order, size: int) -> list[str]:
    """What stands under each picture of a sheet, if anything; ``UserError`` where the sheet would be too large."""
    if Path(str(order.out)).suffix.lower() == ARRAY:
        return []
    n = len(order.seeds)
    rows, columns = (len(order.sweep), n) if order.sweep else grid_shape(n)
    labels = ["0"] if order.labels else []
    width, height = cell(size, labels)
    if order.labels and max(columns * width, rows * height) <= MAX_SHEET_SIDE:
        labels = [f"{seed}, psi {psi:g}" for psi in order.sweep for seed in order.seeds] or list(map(str, order.seeds))
        width, height = cell(size, labels)
    if max(columns * width, rows * height) > MAX_SHEET_SIDE:
        most = MAX_SHEET_SIDE // width if order.sweep else (MAX_SHEET_SIDE // max(width, height)) ** 2
        raise UserError(
            f"--n {n}: one sheet of {rows} x {columns} pictures of {size}x{size} would be {columns * width}x"
            f"{rows * height} pixels, more than {MAX_SHEET_SIDE} a side; use at most --n {most}, or --out DIR/ for "
            "files"
        )
    return labels


def _chunk(generator: Generator) -> int:
    """Pictures in memory at a time."""
    return max(1, min(CHUNK, CHUNK_BYTES // (3 * generator.size**2)))


def _scaled(seeds: Sequence[int], psis: Sequence[float], generator: Generator) -> Iterator[np.ndarray]:
    """The latents of all seeds for each psi, a chunk at a time: float32 ``[<= CHUNK, z_dim]``."""
    chunk = _chunk(generator)
    for psi in psis:
        for first in range(0, len(seeds), chunk):
            yield latents(seeds[first : first + chunk], generator.z_dim) * np.float32(psi)


def _pictures(generator: Generator, chunks: Iterable[np.ndarray], total: int, before: int = 0) -> Iterator[np.ndarray]:
    """Each picture uint8 ``[size, size, 3]`` of all chunks; says how far it is every few seconds.

    ``before`` of the ``total`` were made by an earlier process.
    """
    done, start = before, time.perf_counter()
    reported = start
    for z in chunks:
        yield from generator(z)
        done, now = done + len(z), time.perf_counter()
        if now - reported >= REPORT_SECONDS and done < total:
            reported, speed = now, (done - before) / (now - start)
            minutes, seconds = divmod(round((total - done) / speed), 60)
            say(f"{done}/{total} pictures, {speed:.0f}/s, {minutes}:{seconds:02d} min left")


def _write_one_file(path: Path, order: Order, generator: Generator, labels: Sequence[str]) -> None:
    n, suffix = len(order.seeds), path.suffix.lower()
    psis = order.sweep or [order.psi]
    total = n * len(psis)
    pictures = _pictures(generator, _scaled(order.seeds, psis, generator), total)
    if suffix == ARRAY:
        shape = (total, generator.size, generator.size, 3)
        with atomic_open(path) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for picture in pictures:
                file.write(picture.tobytes())
        return
    sheet = grid(np.stack(list(pictures)), n if order.sweep else None, labels)
    with atomic_open(path) as file:
        save(sheet, file, suffix)


def _write_many(folder: Path, order: Order, generator: Generator) -> None:
    """Single files or shards, going on where an earlier process was stopped."""
    from infer import bulk  # hashes and tars would cost every small command its start

    digest = bulk.sha256(Path(order.onnx))
    suffix = order.suffix or ".png"
    settings = bulk.settings(digest, order.seeds, order.psi, suffix, generator.provider, order.shards)
    progress = bulk.Progress(folder, settings)
    progress.begin()
    chunks = _scaled(order.seeds[progress.done :], [order.psi], generator)
    files = encoded(_pictures(generator, chunks, len(order.seeds), progress.done), suffix)
    if not order.shards:
        bulk.write_files(folder, order.seeds, suffix, files, progress)
        return
    contacts = chain.from_iterable(map(generator, _scaled(order.seeds[:CONTACTS], [order.psi], generator)))
    with atomic_open(folder / bulk.CONTACT) as file:
        save(grid(np.stack(list(contacts))), file, ".png")
    options = {"generator_sha256": digest, "psi": order.psi, "provider": generator.provider}
    bulk.write_shards(folder, order.seeds, generator.size, order.psi, files, progress, options)
