"""What the benchmarks share: rates measured in turns, ratios of them, a table for people."""

from __future__ import annotations

import argparse
import math
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from catgan.command import say
from trainer.data.build.progress import progress

Work = Callable[[], int]
"""A unit of work, such as a training step. Returns the images it was about."""


def positive(text: str) -> float:
    """An argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a number above 0")
    return value


def count(text: str) -> int:
    """An argument type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a whole number from 1")
    return int(text)


def device() -> torch.device:
    """The GPU if there is one, else the CPU with as many threads as this process may use cores."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    return torch.device("cpu")


def wait_for_device() -> None:
    """GPUs work on after a call returns; a clock must be read only when they are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """What the numbers were measured on, for the record beside them."""
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads, {versions}"


def rate(work: Work, seconds: float) -> float:
    """Images per second of doing ``work`` over and over for ``seconds``, at least once."""
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
    """Measure several ways of doing the same in turns: a b c, a b c, ...

    A machine's speed drifts, so a ratio is taken within each round, between neighbours in time, and of the rounds the
    median. Each turn begins with ``settle`` units of work that are not counted: what the way before left in caches,
    and what a loader read ahead in its pause, is used up by then.

    Args:
        what: the label of the progress bar.
        ways: the first is the one that the others are compared with.
        seconds: length of a turn.

    Returns:
        ``images_per_second`` {way: median}, ``ratios`` {other way: the first way's speed over the other's}, and
        ``ratio``, the lowest of these.
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


def quartiles(ratios: Sequence[float]) -> list[float]:
    """The lower one, the median and the upper one; three times the same of a single value."""
    return [round(q, 3) for q in (statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios] * 3)]


def of_two_processes(work: Callable[..., None], *arguments: object) -> Any:
    """What rank 0 of two processes puts into its queue, which is little: a pipe holds it until both have ended.

    Args:
        work: called in both as ``work(rank, address, queue, *arguments)``; ``address`` is for ``init_process_group``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (address, queue, *arguments), nprocs=2)
    return queue.get()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print ``rows`` under ``columns`` on stderr, aligned to the right, after what they were measured on."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say(f"\n{machine()}\n")
    for row in cells:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
