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
from trainer.tracking.outbox import DeliveryState, DeliveryThread, Outbox, OutboxBusy, Refused, Send


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


def start(outbox: Outbox, send: Send) -> DeliveryThread:
    return DeliveryThread(lambda: outbox.deliver_points(send), "the server", "records", lambda: (ConnectionError,))


def fill(outbox: Outbox, *numbers: int) -> None:
    for n in numbers:
        outbox.put({"kind": "status", "n": n})


def test_records_are_delivered_in_order_and_once_by_several_processes(tmp_path: Path) -> None:
    receiver = Receiver()
    fill(Outbox(tmp_path), 0, 1, 2)
    assert Outbox(tmp_path).num_undelivered() == 3
    Outbox(tmp_path).deliver_points(receiver.send)
    fill(Outbox(tmp_path), 3)
    outbox = Outbox(tmp_path)
    assert outbox.num_undelivered() == 1
    outbox.deliver_points(receiver.send)
    assert outbox.num_undelivered() == 0
    outbox.deliver_points(receiver.send)
    assert receiver.received == [0, 1, 2, 3]
    assert Outbox(tmp_path).state()["run_id"] == "after 3"


def test_records_sent_before_a_failure_are_not_sent_again(tmp_path: Path) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)

    def fail_after_first(records: Sequence[Record], state: DeliveryState) -> int:
        receiver.away = len(receiver.received) > 0
        return receiver.send(records, state)

    with pytest.raises(ConnectionError):
        outbox.deliver_points(fail_after_first)
    assert (receiver.received, outbox.num_undelivered()) == ([0, 1], 1)
    receiver.away = False
    outbox.deliver_points(receiver.send)
    assert receiver.received == [0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "incomplete", "ahead"])
def test_without_a_valid_state_all_records_are_sent_again(tmp_path: Path, damage: str) -> None:
    outbox, receiver = Outbox(tmp_path), Receiver()
    fill(outbox, 0, 1, 2)
    outbox.deliver_points(receiver.send)
    state = tmp_path / "outbox.json"
    if damage == "missing":
        state.unlink()
    elif damage == "incomplete":
        state.write_text(state.read_text()[:5])
    else:  # a power cut has truncated the journal
        lines = (tmp_path / "outbox.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "outbox.jsonl").write_text("".join(lines[:1]))
        fill(outbox, 1)
    outbox.deliver_points(receiver.send)
    assert receiver.received == [0, 1, 2, 0, 1] + [2] * (damage != "ahead")


def test_an_outbox_written_by_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """The names of the files and their keys never change."""
    first = b'{"time": 1, "kind": "scalars", "nimg": 1000, "values": {"x": 1.0}}\n'
    second = b'{"time": 2, "kind": "scalars", "nimg": 2000, "values": {"x": 2.0}}\n'
    (tmp_path / "outbox.jsonl").write_bytes(first + second)
    (tmp_path / "outbox.json").write_text(f'{{"delivered": {len(first)}, "run_id": "0123", "notes": ["a"]}}')
    received: list[Record] = []

    def send(records: Sequence[Record], state: DeliveryState) -> int:
        assert state["run_id"] == "0123"
        received.extend(records)
        return len(records)

    Outbox(tmp_path).deliver_points(send)
    assert received == [{"time": 2, "kind": "scalars", "nimg": 2000, "values": {"x": 2.0}}]
    assert Outbox(tmp_path).state()["delivered"] == len(first + second)
    assert Outbox(tmp_path).num_undelivered() == 0


class Store:
    """Takes files, except those that ``refuses`` names."""

    def __init__(self, *refuses: str) -> None:
        self.refuses = set(refuses)
        self.received: list[str] = []
        self.seconds = 0.0
        self.away = False

    def send(self, record: Record, run_id: str) -> None:
        assert run_id == "0123"
        if self.away:
            raise ConnectionError("gone")
        name = record.get("path", "events.txt")
        time.sleep(self.seconds)
        if name in self.refuses:
            raise Refused("413")
        self.received.append(name)


def fill_with_files(outbox: Outbox, *names: str) -> None:
    """Queue a file and a point for each name, for a run that is open in MLflow."""
    for name in names:
        outbox.put({"kind": "artifact", "path": name})
        outbox.put({"kind": "scalars", "n": name})
    outbox.save_state(outbox.state() | {"run_id": "0123"})


def names_of_points(outbox: Outbox) -> list[str]:
    received: list[str] = []

    def send(records: Sequence[Record], state: DeliveryState) -> int:
        received.extend(record["n"] for record in records)
        return len(records)

    outbox.deliver_points(send)
    return received


def test_points_do_not_wait_for_files(tmp_path: Path) -> None:
    outbox, store = Outbox(tmp_path), Store()
    store.away = True
    fill_with_files(outbox, "a", "b")
    with pytest.raises(ConnectionError):
        outbox.deliver_files(store.send)
    assert names_of_points(outbox) == ["a", "b"]
    assert outbox.num_undelivered() == 2
    store.away = False
    outbox.deliver_files(store.send)
    outbox.deliver_files(store.send)
    assert store.received == ["a", "b"]
    assert outbox.num_undelivered() == 0


def test_points_are_delivered_while_a_file_is_on_its_way(tmp_path: Path) -> None:
    outbox, hanging, gate = Outbox(tmp_path), threading.Event(), threading.Event()
    fill_with_files(outbox, "a")

    def send(record: Record, run_id: str) -> None:
        hanging.set()
        gate.wait()

    thread = DeliveryThread(lambda: outbox.deliver_files(send), "the server", "files", lambda: (ConnectionError,))
    assert hanging.wait(30)
    assert names_of_points(Outbox(tmp_path)) == ["a"]
    gate.set()
    thread.close(30)
    assert outbox.num_undelivered() == 0


def test_a_refused_file_is_named_and_tried_again_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outbox, store = Outbox(tmp_path), Store("b")
    fill_with_files(outbox, "a", "b", "c")
    outbox.put({"kind": "note", "n": "note"})
    outbox.deliver_files(store.send)
    assert store.received == ["a", "c", "events.txt"]
    assert "MLflow refuses b (413); this is tried again later" in capsys.readouterr().err
    names_of_points(outbox)
    assert outbox.num_undelivered() == 1
    assert [entry["file"] for entry in Outbox(tmp_path).refused_files()] == ["b"]
    outbox.deliver_files(store.send)  # still refused: no second warning
    store.refuses.clear()
    assert outbox.deliver_files(store.send, patient=True) == pytest.approx(10, abs=2)  # too early
    assert capsys.readouterr().err == ""
    assert outbox.num_undelivered() == 1
    assert Outbox(tmp_path).deliver_files(store.send) is None
    Outbox(tmp_path).deliver_files(store.send)
    assert store.received == ["a", "c", "events.txt", "b"]
    assert outbox.num_undelivered() == 0


def test_files_of_a_slow_store_that_refuses_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal can take minutes, so that not all files can be tried each time."""
    monkeypatch.setattr("trainer.tracking.outbox._REFUSING_SECONDS", 0.01)
    outbox, store = Outbox(tmp_path), Store("a", "b")
    store.seconds = 0.02
    fill_with_files(outbox, "a", "b", "c")
    for received in ([], [], ["c"], ["c"]):  # a; b; c and a again; b again
        outbox.deliver_files(store.send)
        assert store.received == received
    store.refuses = {"a"}
    outbox.deliver_files(store.send)  # a
    outbox.deliver_files(store.send)  # b
    assert store.received == ["c", "b"]


def test_the_thread_tries_a_refused_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.tracking.outbox._RETRY_SECONDS", 0.02)
    outbox, store = Outbox(tmp_path), Store("a")
    fill_with_files(outbox, "a", "b")
    thread = DeliveryThread(
        lambda: outbox.deliver_files(store.send, patient=True), "the server", "files", lambda: (ConnectionError,)
    )
    deadline = time.monotonic() + 30
    while [entry["tries"] for entry in outbox.refused_files()] < [3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.refuses.clear()
    while outbox.refused_files():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.close(30)
    assert store.received == ["b", "a"]


def test_files_of_an_outbox_that_had_one_lane_are_continued(tmp_path: Path) -> None:
    outbox, store = Outbox(tmp_path), Store()
    fill_with_files(outbox, "a", "b")
    first = (tmp_path / "outbox.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "outbox.json").write_text(f'{{"delivered": {len(first)}, "run_id": "0123"}}')
    assert names_of_points(outbox) == ["a", "b"]
    outbox.deliver_files(store.send)
    assert store.received == ["b"]
    (tmp_path / "outbox.files.json").unlink()
    outbox.deliver_files(store.send)
    assert store.received == ["b", "b"]


def test_files_wait_for_the_run(tmp_path: Path) -> None:
    outbox, store = Outbox(tmp_path), Store()
    outbox.put({"kind": "artifact", "path": "a"})
    outbox.deliver_files(store.send)
    assert (store.received, outbox.num_undelivered()) == ([], 1)


def _deliver_forever(folder: Path, started: Path) -> None:
    def send(records: Sequence[Record], state: DeliveryState) -> int:
        started.touch()
        time.sleep(600)
        return 1

    Outbox(folder).deliver_points(send)


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
            outbox.deliver_points(receiver.send)
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    outbox.deliver_points(receiver.send)
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
    outbox.deliver_points(receiver.send)
    assert outbox.num_undelivered() == 0


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
    thread = start(outbox, send)
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
    thread = start(outbox, send)
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
    thread = start(outbox, receiver.send)
    thread.close(60)
    assert not thread._thread.is_alive()
    assert outbox.num_undelivered() == 1
