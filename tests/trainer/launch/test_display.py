"""What a terminal shows of a training, a log, and what a worker on Ray tells its driver."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import pytest

from catgan.command import lines_to, say
from trainer.launch.display import progress_display
from trainer.launch.link import listening, telling
from trainer.tracking.progress import Progress

VALUES = {
    "speed/images_per_second": 169.4,
    "loss/discriminator": 0.4286,
    "loss/generator": 3.9696,
    "d/real": 2.67,
    "d/fake": -2.56,
}
START, MIDDLE, END = Progress(0, 40_000, {}), Progress(10_000, 40_000, VALUES, 3723.4), Progress(40_008, 40_000, VALUES)

_END = "\x02"


class Terminal:
    """A pseudo-terminal as stderr."""

    def __init__(self, columns: int, rows: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stderr = os.fdopen(slave, "w", encoding="utf-8")

    def screen(self) -> list[str]:
        """The lines on it; a line that is written over is gone."""
        print(_END, end="", file=self.stderr, flush=True)
        data = b""
        while _END.encode() not in data:  # a read returns a part
            data += os.read(self._master, 1 << 20)
        written = data.decode().removesuffix(_END)
        lines, line, column = [], "", 0
        for part in written.replace("\r\n", "\n").replace("\x1b[K", "\x1b").replace("\x1b[A", "\x01"):
            assert part != "\x01", "one bar does not move the cursor up"
            if part == "\n":
                lines.append(line.rstrip())
                line, column = "", 0
            elif part == "\r":
                column = 0
            elif part == "\x1b":
                line = line[:column]
            else:
                line, column = line[:column] + part + line[column + 1 :], column + 1
        return [*lines, line.rstrip()]


@contextmanager
def terminal_of(columns: int, rows: int = 24) -> Iterator[Terminal]:
    """Not a fixture: pytest sets stderr between those and the test."""
    terminal = Terminal(columns, rows)
    with redirect_stderr(terminal.stderr):
        yield terminal


def test_a_terminal_shows_messages_above_one_bar() -> None:
    with terminal_of(100) as terminal:
        say("before")
        with progress_display() as show:
            say("nothing is known yet")
            show(START)
            say("a message")
            show(MIDDLE)
            other = threading.Thread(target=say, args=["warning: of another thread"])
            other.start()
            other.join()
            print("in ", end="", file=sys.stderr)
            show(MIDDLE)
            print("parts", file=sys.stderr)
        say("after")
        *lines, bar, after, end = terminal.screen()
        assert lines == ["before", "nothing is known yet", "a message", "warning: of another thread", "in parts"]
        assert bar.startswith(" 25%|█")
        assert bar.endswith("| 10.00/40 kimg, 1:02:03 left, 169 images/s, loss D 0.4286 G 3.9696")
        assert len(bar) < 100
        assert (after, end) == ("after", "")


def test_stdout_on_a_terminal_goes_above_the_bar_too() -> None:
    with terminal_of(100) as terminal, redirect_stdout(terminal.stderr):
        with progress_display() as show:
            show(MIDDLE)
            print("(raylet) a worker died")
        assert sys.stdout is terminal.stderr
        message, bar, _ = terminal.screen()
        assert message == "(raylet) a worker died"
        assert bar.startswith(" 25%|")


@pytest.mark.parametrize(("columns", "rows", "longest"), [(30, 24, 30), (0, 0, 80), (100, 0, 80)])
def test_the_bar_stays_in_one_line(columns: int, rows: int, longest: int) -> None:
    with terminal_of(columns, rows) as terminal:
        with progress_display() as show:
            show(MIDDLE)
            show(END)
        bar, end = terminal.screen()
        assert bar.startswith("100%|")
        assert "40.00/40 kimg" in bar
        assert len(bar) <= longest
        assert end == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(130), ValueError])
def test_a_training_that_fails_or_is_interrupted_leaves_the_bar_as_it_was(
    error: BaseException | type[BaseException],
) -> None:
    with terminal_of(100) as terminal:

        def interrupted() -> None:
            with progress_display() as show:
                show(MIDDLE)
                raise error

        with pytest.raises((KeyboardInterrupt, SystemExit, ValueError)):
            interrupted()
        assert sys.stderr is terminal.stderr
        say("interrupted")
        bar, message, _ = terminal.screen()
        assert " 25%|" in bar
        assert message == "interrupted"


def test_the_bar_goes_back_after_a_rollback() -> None:
    with terminal_of(100) as terminal:
        with progress_display() as show:
            show(END)
            show(Progress(10_000, 40_000, {}))
        bar, _ = terminal.screen()
        assert bar.startswith(" 25%|")
        assert bar.endswith("10.00/40 kimg")


def test_a_reader_process_writes_over_the_bar() -> None:
    with terminal_of(100) as terminal:
        with progress_display() as show:
            show(MIDDLE)
            if not (child := os.fork()):
                say("warning: of a reader")
                os._exit(0)
            os.waitpid(child, 0)
            show(MIDDLE)
        message, bar, _ = terminal.screen()
        assert message == "warning: of a reader"
        assert bar.startswith(" 25%|")


def test_a_log_has_a_line_for_each_tick(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display() as show:
        show(START)
        show(MIDDLE)
        show(Progress(2_000, 40_000, VALUES | {"loss/generator": float("nan")}, 59.6))
    assert capsys.readouterr().err.splitlines() == [
        "kimg    10.00/40     169 images/s  loss D  0.4286 G  3.9696  D(real)  +2.67 D(fake)  -2.56  left 1:02:03",
        "kimg     2.00/40     169 images/s  loss D  0.4286 G     nan  D(real)  +2.67 D(fake)  -2.56  left 1:00",
    ]


class Remote:
    """A method of an actor, which runs at once; ``ray.get`` then gets what it returned."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Link:
    """The actor of ``create_link``, in this process."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.tell, self.take, self.is_stop_requested = (
            Remote(self.told.append),
            Remote(self._take),
            Remote(lambda: False),
        )

    def _take(self) -> list[Any]:
        told = self.told[:]
        del self.told[: len(told)]
        return told


def test_a_driver_shows_what_workers_say_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.get", lambda value: value)
    link: Any = Link()
    with listening(link, lambda progress: say(f"{progress.nimg} {progress.values}")):
        with telling(link, 3):
            say("of another rank")
        with telling(link, 0) as show:
            say("one")
            show(START)
            say("two")
        say("three")
    shown = capsys.readouterr().err.splitlines()
    told = ["worker 3: of another rank", "one", "0 {}", "two"]
    assert [line for line in shown if line in told] == told  # the others come in between
    assert set(shown) - set(told) == {"three"}


def test_a_reader_process_of_a_worker_prints_its_lines(capfd: pytest.CaptureFixture[str]) -> None:
    found: list[str] = []
    with lines_to(found.append):
        if not (reader := os.fork()):
            say("of a reader")
            os._exit(0)
        os.waitpid(reader, 0)
    assert (found, capfd.readouterr().err) == ([], "of a reader\n")


def test_lines_are_printed_again_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[str] = []
    with pytest.raises(ValueError, match="failed"), lines_to(found.append):  # noqa: PT012
        say("warning: https://host/file?token=secret\nfailed")
        raise ValueError("failed")
    say("after")
    assert found == [r"warning: https://host/file\nfailed"]
    assert capsys.readouterr().err == "after\n"
