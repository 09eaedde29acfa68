"""Progress bars for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None, done: int = 0) -> Iterator[T]:
    """``items`` with a bar on stderr; where that is a log file, a line in ten seconds instead of ten in a second.

    Args:
        done: how many of ``total`` an earlier process did.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, what, total, unit=f" {unit}s", mininterval=interval, initial=done)
