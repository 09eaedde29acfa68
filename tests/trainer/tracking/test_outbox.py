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
from trainer.tracking.outbox import DeliveryState, DeliveryThread, Outbox, OutboxBusy, brief, redact


class Receiver:
    """Takes up to two records at a time, unless it is away."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.away = False

    def send(self, records: Sequence[Record], state: DeliveryState) -> int:
        if self.away:
            raise ConnectionError("gone")
        self.received += [record["n"] for record in records[:2]]
        state["run_id"] = f"after {self.received[-1]}"
        return len(records[:2])


def fill(outbox: Outbox, *numbers: int) -> None:
    for n in numbers:
        outbox.put({"n": n})


def test_records_are_delivered_in_order_and_once_by_several_processes(tmp_path: Path) -> None:
    receiver = Receiver()
    fill(Outbox(tmp_path), 0, 1, 2)
    assert Outbox(tmp_path).num_undelivered() == 3
    assert Outbox(tmp_path).deliver(receiver.send) == 3
    fill(Outbox(tmp_path), 3)
    outbox = Outbox(tmp_path)
    assert outbox.num_undelivered() == 1
    assert outbox.deliver(receiver.send) == 1
    assert outbox.deliver(receiver.send) == 0
    assert receiver.received == [0, 1, 2, 3]
    assert Outbox(tmp_path).state()["run_id"] == "after 3"


def test_records_sent_before_a_failure_are_not_sent_again(tmp_path: Path) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)

    def fail_after_first(records: Sequence[Record], state: DeliveryState) -> int:
        receiver.away = len(receiver.received) > 0
        return receiver.send(records, state)

    with pytest.raises(ConnectionError):
        outbox.deliver(fail_after_first)
    assert (receiver.received, outbox.num_undelivered()) == ([0, 1], 1)
    receiver.away = False
    outbox.deliver(receiver.send)
    assert receiver.received == [0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "incomplete", "ahead"])
def test_without_a_valid_state_all_records_are_sent_again(tmp_path: Path, damage: str) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)
    outbox.deliver(receiver.send)
    state = tmp_path / "outbox.json"
    if damage == "missing":
        state.unlink()
    elif damage == "incomplete":
        state.write_text(state.read_text()[:5])
    else:  # a power cut has truncated the journal
        lines = (tmp_path / "outbox.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "outbox.jsonl").write_text("".join(lines[:1]))
        fill(outbox, 1)
    outbox.deliver(receiver.send)
    assert receiver.received == [0, 1, 2, 0, 1] + [2] * (damage != "ahead")


def test_an_outbox_written_by_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """The names of the files and their keys never change."""
    first = b'{"time": 1, "kind": "scalars", "nimg": 1000, "values": {"x": 1.0}}\n'
    second = b'{"time": 2, "kind": "scalars", "nimg": 2000, "values": {"x": 2.0}}\n'
    (tmp_path / "outbox.jsonl").write_bytes(first + second)
    (tmp_path / "outbox.json").write_text(f'{{"delivered": {len(first)}, "run_id": "0123", "notes": ["a"]}}')
    received: list[Record] = []

    def send(records: Sequence[Record], state: DeliveryState) -> int:
        assert (state["run_id"], state["notes"]) == ("0123", ["a"])
        received.extend(records)
        return len(records)

    assert Outbox(tmp_path).deliver(send) == 1
    assert received == [{"time": 2, "kind": "scalars", "nimg": 2000, "values": {"x": 2.0}}]
    assert Outbox(tmp_path).state() == {"delivered": len(first + second), "run_id": "0123", "notes": ["a"]}


def _deliver_forever(folder: Path, started: Path) -> None:
    def send(records: Sequence[Record], state: DeliveryState) -> int:
        started.touch()
        time.sleep(600)
        return 1

    Outbox(folder).deliver(send)


def test_one_process_delivers_at_a_time_and_a_killed_one_releases_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.outbox._LOCK_SECONDS", 0.2)
    outbox, receiver, started = Outbox(tmp_path), Receiver(), tmp_path / "started"
    fill(outbox, 0)
    other = multiprocessing.get_context("fork").Process(target=_deliver_forever, args=(tmp_path, started))
    other.start()
    try:
        while not started.exists():
            assert other.is_alive()
            time.sleep(0.01)
        with pytest.raises(OutboxBusy):
            outbox.deliver(receiver.send)
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert outbox.deliver(receiver.send) == 1
    assert receiver.received == [0]


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


def test_the_thread_retries_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.tracking.outbox._RETRY_SECONDS", 0.02)
    outbox, receiver, failed = Outbox(tmp_path), Receiver(), threading.Semaphore(0)
    receiver.away = True

    def send(records: Sequence[Record], state: DeliveryState) -> int:
        failed.release()
        return receiver.send(records, state)

    fill(outbox, 0)
    thread = DeliveryThread(outbox, send, "the server", (ConnectionError,))
    for n in (1, 2):
        fill(outbox, n)
        thread.notify()
        assert failed.acquire(timeout=30)
        assert failed.acquire(timeout=30)
    assert receiver.received == []
    receiver.away = False
    fill(outbox, 3)
    thread.close(30)
    assert receiver.received == [0, 1, 2, 3]
    output = capsys.readouterr().err
    assert output.count("the server accepts no records (gone)") == 1
    assert output.count("the server accepts records again") == 1


def test_close_waits_no_longer_than_its_timeout(tmp_path: Path) -> None:
    outbox, hanging, gate = Outbox(tmp_path), threading.Event(), threading.Event()

    def send(records: Sequence[Record], state: DeliveryState) -> int:
        hanging.set()
        gate.wait()
        return len(records)

    fill(outbox, 0)
    thread = DeliveryThread(outbox, send, "the server", (ConnectionError,))
    assert hanging.wait(30)
    fill(outbox, 1)  # would block if it waited for the thread
    thread.notify()
    thread.close(0.01)
    assert outbox.num_undelivered() == 2
    gate.set()
    thread.close(30)
    assert outbox.num_undelivered() == 0


def test_close_does_not_wait_for_a_receiver_that_is_away(tmp_path: Path) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    receiver.away = True
    fill(outbox, 0)
    thread = DeliveryThread(outbox, receiver.send, "the server", (ConnectionError,))
    thread.close(60)
    assert not thread._thread.is_alive()
    assert outbox.num_undelivered() == 1


def test_brief_names_an_innermost_cause_of_the_operating_system() -> None:
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
