"""The table of trials on the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from catgan.command import lines_to, say
from catgan.text import printable
from trainer.sweeps.state import Ledger, Trial

_MAX_ROWS = 40
_SECONDS = 1.0


class Table:
    """Prints the trials to stderr: on a terminal in place, else when a trial begins or ends."""

    def __init__(self, ledger: Ledger, fields: Sequence[str], kimg: float) -> None:
        self._ledger, self._fields, self._kimg = ledger, fields, kimg
        self._is_live = self._is_writing = False
        self._messages: list[str] = []
        self._height = 0
        self._printed = 0.0

    @contextmanager
    def live(self) -> Iterator[None]:
        """Inside the block the table is kept up to date below all messages of this process, if stderr is a terminal. At
        the end it is erased."""
        if not sys.stderr.isatty():
            yield
            return
        self._is_live = True
        try:
            with lines_to(self._say):
                yield
        finally:
            self._is_live = False
            sys.stderr.write(self._erasure())
            sys.stderr.flush()

    def changed(self, trial: Trial | None = None) -> None:
        """There is news; of a trial that begins or ends."""
        if not self._is_live:
            if trial is not None:
                say(self._line(trial))
        elif trial is not None or time.monotonic() - self._printed >= _SECONDS:
            self._draw()

    def show(self) -> None:
        """Print the whole table."""
        for line in self.lines():
            say(line)

    def lines(self, rows: int = _MAX_ROWS) -> list[str]:
        """The table, all columns as wide as their longest entry. Of more than ``rows`` trials, those that run and those
        that were the last to begin."""
        trials = list(self._ledger.trials.values())
        order = {"running": 2, "waiting": 0}
        first = sorted(range(len(trials)), key=lambda i: (order.get(trials[i].status, 1), i), reverse=True)
        trials = [trials[i] for i in sorted(first[:rows])]
        metric = self._ledger.metric or "distance"
        table = [["trial", *(f.rpartition(".")[2] for f in self._fields), "seed", "kimg", metric, "", "left"]]
        table += [self._cells(trial) for trial in trials]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]

    def _say(self, message: str) -> None:
        """Print a message above the table."""
        self._messages.append(message)
        if not self._is_writing:  # else a signal interrupts _draw, which prints it
            self._draw()

    def _draw(self) -> None:
        """Print the messages and the table in place of the table before."""
        self._is_writing = True
        while True:
            messages, self._messages = self._messages, []
            columns, lines = _terminal_size()
            # Lines that are wrapped, or scrolled out, could not be erased again.
            table = [printable(line)[: max(columns - 1, 1)] for line in self.lines(min(max(lines - 2, 1), _MAX_ROWS))]
            sys.stderr.write(self._erasure() + "".join(f"{line}\n" for line in messages + table))
            sys.stderr.flush()
            self._height, self._printed = len(table), time.monotonic()
            if not self._messages:
                break
        self._is_writing = False

    def _erasure(self) -> str:
        """What erases the table."""
        height, self._height = self._height, 0
        return f"\x1b[{height}F\x1b[J" if height else ""

    def _cells(self, trial: Trial) -> list[str]:
        last = trial.last
        return [
            trial.name,
            *(trial.values.get(field, "") for field in self._fields),
            str(trial.seed),
            f"{trial.kimg:g}/{self._kimg:g}",
            f"{last.value:.2f}" if last else "-",
            trial.status,
            _duration(trial.seconds_left(self._kimg)),
        ]

    def _line(self, trial: Trial) -> str:
        values = " ".join(f"{field}={value}" for field, value in trial.values.items())
        last = f", {self._ledger.metric} {trial.last.value:.2f} at {trial.kimg:g} kimg" if trial.last else ""
        return f"{trial.name} {trial.status}: {values} seed={trial.seed}{last}"


def _terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal at stderr; stdout may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        return shutil.get_terminal_size()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
