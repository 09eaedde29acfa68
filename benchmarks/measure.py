"""Helpers of the benchmark scripts: speeds measured in alternating turns, their ratios, and a table for the terminal.

The speed of a machine drifts, by up to a half within minutes on shared hardware. Alternatives are therefore measured in
short turns, a b c a b c, and each ratio is taken within one round, between turns that are seconds apart.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from catgan.command import UserError, number, say
from catgan.machine import cores
from trainer.data.build.progress import progress

ROOT = Path(__file__).resolve().parents[1]

Work = Callable[[], int]
"""One unit of work, such as a training step. Returns the number of images it processed."""

count = number(int, 1, 10**9)
"""Argument type: a whole number from 1."""
positive = number(float, 1e-6, 1e6)
"""Argument type: a number above 0."""


def add_turn_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Add ``--seconds`` and ``--repeats``, which ``compare`` takes."""
    add = parser.add_argument
    add("--seconds", type=positive, default=seconds, metavar="S", help="length of a turn (default: %(default)s)")
    add("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")


def device() -> torch.device:
    """The GPU if there is one, else the CPU, with OMP_NUM_THREADS threads or one per core that this process may use.

    Where other programs run, one is better: several would wait for each other, and that counts as processor time.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    return torch.device("cpu")


def wait_for_device() -> None:
    """Wait until the GPU has finished: calls return before their work is done, so read no clock without this."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """Processor or GPU, threads and versions, to record beside the numbers."""
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads, {versions}"


def rate(work: Work, seconds: float) -> float:
    """Images per second of repeating ``work`` for ``seconds``, at least once."""
    images = 0
    wait_for_device()
    began = time.perf_counter()
    while True:
        images += work()
        if time.perf_counter() - began >= seconds:
            break
    wait_for_device()
    return images / (time.perf_counter() - began)


def compare(what: str, ways: Mapping[str, Work], *, seconds: float, repeats: int, settle: int) -> dict[str, Any]:
    """Measure several ways of doing the same work in alternating turns.

    Args:
        what: label of the progress bar.
        ways: the first one is compared with each of the others.
        seconds: length of a turn.
        repeats: rounds; each has one turn of every way.
        settle: units of work at the start of a turn that are not counted. They use up what a loader read ahead while
            it was paused, and refill the caches.

    Returns:
        ``images_per_second`` {way: median}, ``ratios`` {other way: median of the first way's speed over the other's},
        and ``ratio``, the lowest of these.
    """
    turns = [name for _ in range(repeats) for name in ways]
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for name in progress(turns, what, "turn", len(turns)):
        for _ in range(settle):
            ways[name]()
        speeds[name].append(rate(ways[name], seconds))
    first, *others = ways
    ratios = {name: round(median_ratio(speeds[first], speeds[name]), 3) for name in others}
    return {
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "ratios": ratios,
        "ratio": min(ratios.values()),
    }


def median_ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of ``ours`` divided by ``other``."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def run_timed(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, float, float]:
    """Run Python with ``arguments`` in the repository's root. Returns its stdout, and the wall seconds and CPU seconds
    that it and its children took.

    Raises:
        UserError: it failed; with the last line of its stderr.
    """
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        printed = done.stderr.strip().splitlines() or ["nothing was printed"]
        raise UserError(f"python {' '.join(arguments[:2])} ended with status {done.returncode}: {printed[-1]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, wall, cpu


def textured(rng: np.random.Generator, width: int, height: int, cells: tuple[int, int], contrast: int) -> Image.Image:
    """A synthetic photo: smooth coloured structure of ``cells`` (columns, rows) with grey levels below ``contrast``,
    plus camera-like grain, so that it compresses and decodes about like a photo."""
    coarse = Image.fromarray(rng.integers(0, contrast, (*cells[::-1], 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print the machine and, right-aligned, ``rows`` under ``columns`` on stderr."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for line in ("", machine(), ""):
        say(line)
    for row in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
