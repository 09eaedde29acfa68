"""Drawn cats: the embedded data set. Any number of procedural cat faces, the same for the same seed.

A picture is decided by ``(seed, index)`` alone; its size only says how finely it is drawn. Try::

    picture, attributes = draw(seed=0, index=7, size=64)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catgan.command import UserError
from trainer.data.drawn.coats import random_cat
from trainer.data.drawn.portrait import paint
from trainer.data.drawn.scene import random_noise

MIN_SIZE, MAX_SIZE = 16, 1024
CHUNK = 64  # pictures a process draws at a time: a tenth of a second or more, so that handing over costs little

Drawn = tuple[NDArray[np.uint8], dict[str, Any]]


def draw(seed: int, index: int, size: int) -> Drawn:
    """Cat ``index`` of the data set ``seed``: (uint8 [size, size, 3] RGB, its attributes).

    The attributes are those of ``coats.Cat``, fit for JSON. Sizes from 16 to 1024 pixels; another size, or a negative
    seed or index, raises ``UserError``.
    """
    _check(seed, index, size)
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    cat = random_cat(rng)
    return paint(cat, random_noise(rng), size), asdict(cat)


def draw_many(seed: int, num: int, size: int, processes: int | None = None) -> Iterator[Drawn]:
    """Cats 0 .. ``num`` - 1 of ``seed`` in order, the same whatever the number of ``processes`` (default: all cores).

    Processes are spawned, not forked (a fork inherits the locks of other threads), so a script that calls this needs
    the usual ``if __name__ == "__main__":``; one process, or few pictures, are drawn in this process.
    """
    _check(seed, num, size)
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes < 1:
        raise UserError(f"processes is {processes}; it must be 1 or more")
    starts = range(0, num, CHUNK)
    processes = min(processes, len(starts))
    if processes <= 1:
        return (draw(seed, index, size) for index in range(num))
    return _draw_in_processes(seed, num, size, processes)


def _draw_in_processes(seed: int, num: int, size: int, processes: int) -> Iterator[Drawn]:
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    ahead: deque[Future[list[Drawn]]] = deque()
    try:
        for start in range(0, num, CHUNK):
            ahead.append(pool.submit(_draw_range, seed, start, min(start + CHUNK, num), size))
            if len(ahead) > 2 * processes:  # no further ahead: a slow reader must not fill the memory
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_range(seed: int, start: int, stop: int, size: int) -> list[Drawn]:
    return [draw(seed, index, size) for index in range(start, stop)]


def _check(seed: int, count: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size} cannot be drawn; choose {MIN_SIZE} to {MAX_SIZE} pixels, such as --size 64")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; choose 0 or more")
    if count < 0:
        raise UserError(f"{count} is no picture's number; counts and indices start at 0")
