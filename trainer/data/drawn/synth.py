"""Drawn cats, the embedded data set: any number of procedural cat faces.

``(seed, index)`` determines the cat, and ``size`` the resolution of its image::

    image, attributes = draw(seed=0, index=7, size=64)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catgan.command import UserError
from catgan.machine import cores
from trainer.data.build.workers import map_ordered, worker_processes
from trainer.data.drawn.coats import random_cat
from trainer.data.drawn.portrait import paint
from trainer.data.drawn.scene import random_noise

MIN_SIZE, MAX_SIZE = 16, 1024
DRAWN_CATS = "drawn cats"
"""The source of such data sets in their manifests."""
CLASS = "coat"
"""The attribute that is the class of a cat in data sets with classes."""
CHUNK = 64  # images per task of a process: a tenth of a second or more, so that transfers cost little

Drawn = tuple[NDArray[np.uint8], dict[str, Any]]
"""An RGB image, uint8 [size, size, 3], and its attributes: the fields of ``coats.Cat``, ready for JSON."""


def draw(seed: int, index: int, size: int) -> Drawn:
    """Draw cat number ``index`` of the data set ``seed``, ``size`` pixels wide and high.

    Raises:
        UserError: ``size`` is not 16 to 1024, or ``seed`` or ``index`` is negative.
    """
    _check(seed, index, size)
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    cat = random_cat(rng)
    return paint(cat, random_noise(rng), size), asdict(cat)


def draw_many(seed: int, num: int, size: int, processes: int | None = None) -> Iterator[Drawn]:
    """Draw cats 0 .. ``num`` - 1 of the data set ``seed``, in order.

    Args:
        processes: None: one per core. With one, or up to 64 cats, they are drawn in this process. Otherwise processes
            are started (see ``worker_processes``), so a script needs the usual ``if __name__ == "__main__":``.

    Raises:
        UserError: at once, for values that ``draw`` refuses and for fewer than one process.
    """
    _check(seed, num, size)
    if processes is None:
        processes = cores()
    if processes < 1:
        raise UserError(f"processes is {processes}; it must be 1 or more")
    starts = range(0, num, CHUNK)
    processes = min(processes, len(starts))
    if processes <= 1:
        return (draw(seed, index, size) for index in range(num))
    return _draw_in_processes(seed, num, size, processes)


def _draw_in_processes(seed: int, num: int, size: int, processes: int) -> Iterator[Drawn]:
    chunks = (range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK))
    with worker_processes(processes, __name__) as pool:
        for drawn in map_ordered(partial(_draw_chunk, seed, size), chunks, pool, ahead=2 * processes):
            yield from drawn


def _draw_chunk(seed: int, size: int, indices: range) -> list[Drawn]:
    return [draw(seed, index, size) for index in indices]


def _check(seed: int, count: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size} cannot be drawn; choose {MIN_SIZE} to {MAX_SIZE} pixels, such as --size 64")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; choose 0 or more")
    if count < 0:
        raise UserError(f"number {count} is negative; choose 0 or more")
