"""The progress bar of a training on a terminal; in a log, a line for each tick."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from tqdm import tqdm

from trainer.tracking.progress import Progress, print_line

_FORMAT = "{percentage:3.0f}%|{bar}| {n:.2f}/{total:g} kimg{postfix}"
_CLEAR_LINE = "\r\x1b[K"


@contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows how far a training is.

    On a terminal it moves a bar, and what is printed inside the block goes above it. At the end of the block, however
    that ends, the bar stays as it is, and the next line follows below.
    """
    terminal = sys.stderr
    if not terminal.isatty():
        yield print_line
        return
    bar, above = _Bar(terminal), cast(TextIO, _AboveBar(terminal))
    with ExitStack() as end:
        end.callback(bar.close)
        end.enter_context(redirect_stderr(above))
        if sys.stdout.isatty():  # Ray prints messages of its own to it
            end.enter_context(redirect_stdout(above))
        yield bar.show


class _Bar:
    """A progress bar that appears with the first progress."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._bar: tqdm[Any] | None = None

    def show(self, progress: Progress) -> None:
        with suppress(OSError):  # a terminal that was closed; training goes on
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        kimg, total = min(progress.nimg, progress.total) / 1000, progress.total / 1000
        if self._bar is None:
            # tqdm shows nothing on a terminal without a size, as some containers have.
            has_size = all(os.get_terminal_size(self._terminal.fileno()))
            size: dict[str, Any] = {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(total=total, initial=kimg, file=self._terminal, bar_format=_FORMAT, **size)
        self._bar.n = kimg  # which goes back after a rollback
        text = ""
        if progress.values:  # the most important first: a narrow terminal cuts the line
            text = f"{progress.time_left} left, {progress.speed}, {' '.join(progress.losses.split())}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


class _AboveBar:
    """A terminal while a bar is in its last line: complete lines are written above the bar.

    A forked process, such as a reader, overwrites the bar, which appears again with the next progress: its copy of the
    bar is an old one, and another thread may have held the bar's lock when it was forked.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal, self._pid = terminal, os.getpid()
        self._thread = threading.local()

    def write(self, text: str) -> int:
        lines, end, rest = (getattr(self._thread, "unfinished", "") + text).rpartition("\n")
        self._thread.unfinished = rest
        with suppress(OSError):
            if end and os.getpid() == self._pid:
                tqdm.write(lines, file=self._terminal)
            elif end:
                self._terminal.write(f"{_CLEAR_LINE}{lines}\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)
