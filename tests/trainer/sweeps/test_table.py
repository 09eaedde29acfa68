"""The table of a sweep on a terminal, as its user sees it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest

from catgan.command import say
from tests.trainer.sweeps.sweeps import add, make, open_ledger
from trainer.sweeps.state import Ledger
from trainer.sweeps.table import Table

COLUMNS, LINES = 50, 8


@contextmanager
def terminal() -> Iterator[Callable[[], list[str]]]:
    """Inside the block stderr is a terminal. Gives a function that returns all its lines so far."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    os.set_blocking(master, False)
    received = bytearray()

    def read() -> list[str]:
        while True:
            try:
                received.extend(os.read(master, 65536))
            except BlockingIOError:
                return emulate(received.decode())

    with os.fdopen(slave, "w", encoding="utf-8") as stream, redirect_stderr(stream):
        yield read
    os.close(master)


def emulate(text: str) -> list[str]:
    """The lines on a terminal that was sent ``text``. The cursor cannot be moved above the first visible one."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[FJ]|[^\x1b]", text):
        if part == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif part.startswith("\x1b"):
            row, column = max(row - int(part[2:-1]), len(lines) - LINES, 0), 0
        elif part == "\r":
            column = 0
        elif part == "\n" or column == COLUMNS:
            row, column = row + 1, column if part == "\n" else 0
            lines += [""] * (row + 1 - len(lines))
        if part not in "\r\n" and not part.startswith("\x1b"):
            lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def sweep(tmp_path: Path, trials: int) -> tuple[Ledger, Table]:
    plan = make("--try", "batch=8,16,32", "--try", "optim.g-lr=log:1e-4..1e-2", "--trials", "4")
    ledger = open_ledger(tmp_path / "s", plan)
    for i in range(trials):
        add(ledger, f"t{i:02d}", {"batch": "8", "optim.g-lr": f"{i + 1}e-3"}, {9.0: 40.0 + i}, "done")
    return ledger, Table(ledger, plan.fields, 9.0)


def test_a_message_stays_above_the_table(tmp_path: Path):
    ledger, table = sweep(tmp_path, 2)
    reason = "t01 has failed: " + "no space is left on this disk " * 4
    with terminal() as screen:
        with table.live():
            table.changed(ledger.trials["t00"])
            say(reason)
            table.changed(ledger.trials["t01"])
            say("Ctrl-C: saving")
            table.changed(ledger.trials["t01"])
            shown = screen()
            text = "".join(line.ljust(COLUMNS) for line in shown)
            assert text.startswith(reason), "all of it, over several lines"
            assert [line.split()[0] for line in shown[3:] if line] == ["Ctrl-C:", "trial", "t00", "t01"]
            assert text.count("t00") == 1, "one table"
        table.show()
        shown = screen()
        assert sum(line.startswith("trial ") for line in shown) == 1
        assert re.search(r"40.00 +done", "".join(shown)), "uncut, for nothing erases it any more"


def test_a_table_larger_than_the_terminal_is_redrawn_in_place(tmp_path: Path):
    ledger, table = sweep(tmp_path, 20)
    ledger.trials["t03"].status = "running"
    with terminal() as screen:
        with table.live():
            for trial in list(ledger.trials.values()) * 2:
                table.changed(trial)
                shown = screen()  # or the terminal's buffer is full
        assert [line.split()[0] for line in shown if line] == ["trial", "t03", "t15", "t16", "t17", "t18", "t19"][:7]
        assert len(shown) <= LINES
        assert max(map(len, shown)) < COLUMNS
        assert screen() == [""], "erased"


def test_a_message_of_a_signal_that_interrupts_drawing_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger, table = sweep(tmp_path, 1)
    lines, interrupted = table.lines, iter(["Ctrl-C: saving"])

    def interrupt(rows: int) -> list[str]:
        for message in interrupted:
            say(message)
        return lines(rows)

    with terminal() as screen, table.live():
        monkeypatch.setattr(table, "lines", interrupt)
        table.changed(ledger.trials["t00"])
        assert [line.split()[0] for line in screen() if line] == ["Ctrl-C:", "trial", "t00"]
