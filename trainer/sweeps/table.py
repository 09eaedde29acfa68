"""The table of trials on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from catgan.command import say
from trainer.sweeps.state import Ledger, Trial

_MAX_ROWS = 40
_SECONDS = 1.0


class Table:
    """Prints the trials to stderr: on a terminal in place, else when a trial begins or ends."""

    def __init__(self, ledger: Ledger, fields: Sequence[str], kimg: float) -> None:
        self._ledger, self._fields, self._kimg = ledger, fields, kimg
        self._height = 0
        self._printed = 0.0

    def changed(self, trial: Trial | None = None) -> None:
        """There is news; of a trial that begins or ends."""
        if sys.stderr.isatty():
            if trial is None and time.monotonic() - self._printed < _SECONDS:
                return
            if self._height:
                sys.stderr.write(f"\x1b[{self._height}F\x1b[J")
            lines = self.lines()
            self._height, self._printed = len(lines), time.monotonic()
            for line in lines:
                say(line)
        elif trial is not None:
            say(self._line(trial))

    def show(self) -> None:
        """Print the whole table."""
        self._height = 0
        for line in self.lines():
            say(line)

    def lines(self) -> list[str]:
        """The table, all columns as wide as their longest entry. Of many trials, those that wait are left out."""
        trials = list(self._ledger.trials.values())
        if len(trials) > _MAX_ROWS:
            trials = [trial for trial in trials if trial.status != "waiting"][-_MAX_ROWS:]
        metric = self._ledger.metric or "distance"
        rows = [["trial", *(f.rpartition(".")[2] for f in self._fields), "seed", "kimg", metric, "", "left"]]
        rows += [self._cells(trial) for trial in trials]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
