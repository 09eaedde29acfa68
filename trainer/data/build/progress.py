"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str, total: int | None, done: int = 0) -> Iterator[T]:
    """Yield ``items`` with a progress bar on stderr, updated ten times a second, or every ten seconds in a log file.

    Args:
        what: the activity, before the bar.
        unit: of an item, in the singular.
        total: number of items, with those already done; None if unknown.
        done: number of items that an earlier process did.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, what, total, unit=f" {unit}s", mininterval=interval, initial=done)
