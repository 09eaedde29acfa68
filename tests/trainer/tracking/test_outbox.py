from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.tracking.journal import Record
from trainer.tracking.outbox import Busy, Courier, Memo, Outbox, brief, redact


class Receiver:
    """Takes up to two records at a time, unless it is away."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.away = False

    def send(self, records: Sequence[Record], memo: Memo) -> int:
        if self.away:
            raise ConnectionError("gone")
        self.got += [record["n"] for record in records[:2]]
        memo["last"] = self.got[-1]
        return len(records[:2])


def fill(outbox: Outbox, *numbers: int) -> None:
    for n in numbers:
        outbox.put({"n": n})


def test_in_order_and_once_over_several_processes(tmp_path: Path) -> None:
    receiver = Receiver()
    fill(Outbox(tmp_path), 0, 1, 2)
    assert Outbox(tmp_path).left() == 3
    assert Outbox(tmp_path).deliver(receiver.send) == 3
    fill(Outbox(tmp_path), 3)
    outbox = Outbox(tmp_path)
    assert outbox.left() == 1
    assert outbox.deliver(receiver.send) == 1
    assert outbox.deliver(receiver.send) == 0
    assert receiver.got == [0, 1, 2, 3]
    assert Outbox(tmp_path).memo()["last"] == 3


def test_what_was_taken_before_a_failure_is_not_sent_again(tmp_path: Path) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)

    def twice(records: Sequence[Record], memo: Memo) -> int:
        receiver.away = len(receiver.got) > 0
        return receiver.send(records, memo)

    with pytest.raises(ConnectionError):
        outbox.deliver(twice)
    assert (receiver.got, outbox.left()) == ([0, 1], 1)
    receiver.away = False
    outbox.deliver(receiver.send)
    assert receiver.got == [0, 1, 2]


@pytest.mark.parametrize("damage", ["gone", "torn", "ahead"])
def test_without_the_note_of_what_was_delivered_all_is_sent_again(tmp_path: Path, damage: str) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)
    outbox.deliver(receiver.send)
    note = tmp_path / "outbox.json"
    if damage == "gone":
        note.unlink()
    elif damage == "torn":
        note.write_text(note.read_text()[:5])
    else:  # the journal lost its end in a power cut
        lines = (tmp_path / "outbox.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "outbox.jsonl").write_text("".join(lines[:1]))
        fill(outbox, 1)
    outbox.deliver(receiver.send)
    assert receiver.got == [0, 1, 2, 0, 1] + [2] * (damage != "ahead")


def _hold(folder: Path, holding: str) -> None:
    def send(records: Sequence[Record], memo: Memo) -> int:
        Path(holding).touch()
        time.sleep(600)
        return 1

    Outbox(folder).deliver(send)


def test_one_delivers_at_a_time_and_a_killed_one_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.outbox._LOCK_SECONDS", 0.2)
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0)
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, str(tmp_path / "holding")))
    other.start()
    try:
        while not (tmp_path / "holding").exists():
            assert other.is_alive()
            time.sleep(0.01)
        with pytest.raises(Busy):
            outbox.deliver(receiver.send)
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert outbox.deliver(receiver.send) == 1
    assert receiver.got == [0]


def test_it_delivers_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an exclusive lock needs a file that is open for writing, see flock(2)."""
    lock = fcntl.flock

    def flock(file: int, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0)
    assert outbox.deliver(receiver.send) == 1


def test_a_courier_tries_again_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.tracking.outbox._RETRY_SECONDS", 0.02)
    outbox, receiver, failed = Outbox(tmp_path), Receiver(), threading.Semaphore(0)
    receiver.away = True

    def send(records: Sequence[Record], memo: Memo) -> int:
        failed.release()
        return receiver.send(records, memo)

    fill(outbox, 0)
    courier = Courier(outbox, send, "the server", (ConnectionError,))
    for n in (1, 2):
        fill(outbox, n)
        courier.wake()
        assert failed.acquire(timeout=30)
        assert failed.acquire(timeout=30)
    assert receiver.got == []
    receiver.away = False
    fill(outbox, 3)
    courier.close(30)
    assert receiver.got == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("the server does not take records (gone)") == 1
    assert said.count("the server takes records again") == 1


def test_a_courier_is_not_waited_for_longer_than_asked(tmp_path: Path) -> None:
    outbox, hanging, gate = Outbox(tmp_path), threading.Event(), threading.Event()

    def send(records: Sequence[Record], memo: Memo) -> int:
        hanging.set()
        gate.wait()
        return len(records)

    fill(outbox, 0)
    courier = Courier(outbox, send, "the server", (ConnectionError,))
    assert hanging.wait(30)
    fill(outbox, 1)  # would never come back if it waited
    courier.wake()
    courier.close(0.01)
    assert outbox.left() == 2
    gate.set()
    courier.close(30)
    assert outbox.left() == 0


def test_closing_does_not_wait_for_one_who_is_away(tmp_path: Path) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    receiver.away = True
    fill(outbox, 0)
    courier = Courier(outbox, receiver.send, "the server", (ConnectionError,))
    courier.close(60)
    assert not courier._thread.is_alive()
    assert outbox.left() == 1


def test_brief_names_the_innermost_cause_of_the_system() -> None:
    outer = RuntimeError("a long paragraph")
    outer.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert brief(outer) == "[Errno 111] Connection refused"
    outer.__cause__ = ValueError("an inner detail")
    assert brief(outer) == "a long paragraph"
    assert brief(ValueError("two\nlines of http://a:b@c/d")) == "two lines of http://c/d"
    assert len(brief(ValueError("x" * 1000))) < 250


def test_redact() -> None:
    assert redact("postgresql://user:pass@host/db and a@b") == "postgresql://host/db and a@b"
    assert redact("http://me:p@ss@host") == "http://host"
    assert redact("http://host/a?to=b@c") == "http://host/a?to=b@c"
