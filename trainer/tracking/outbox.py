"""A log of records on disk, delivered to a server that may be slow or away, in two lanes: points and files.

Points are what the tracking server stores in its database, files go to its artifact store. Each lane has its own
position in the log, lock and thread, so that a store which refuses a file or does not answer never delays a metric.
A note is in both lanes: it is a tag and a line in a file.

In the run's folder:

- ``outbox.jsonl``: all records, in the order they were queued. It only grows.
- ``outbox.json``: how many bytes of it were delivered as points, and MLflow's run id.
- ``outbox.files.json``: how many bytes were delivered as files, and the files among them that were refused.
- ``.outbox.lock``, ``.outbox.files.lock``: locked by the process that delivers. The files are never removed.

A lane sends its oldest records, saves its state, and continues with the next. A process killed between the two sends
the same records again, so sending a record twice must have the same effect as sending it once
(``trainer.tracking.delivery`` says how). It also follows that losing a state loses nothing: all is sent again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from filelock import FileLock, Timeout

from catgan.command import say
from catgan.files import atomic_write
from trainer.tracking.journal import Journal, Record
from trainer.tracking.messages import brief

POSITIONS = ("outbox.json", "outbox.files.json")
"""The files that a delivery changes."""

_RECORDS_AT_ONCE = 200
_RETRY_SECONDS = 5.0  # doubled for a file with each refusal
_LONGEST_RETRY_SECONDS = 600.0
_LOCK_SECONDS = 10.0
_REFUSING_SECONDS = 60.0  # that refused files may take before the others wait for a later call; one may take minutes

_NAMED = 3  # files in a message

_ONLY_FILES = ("grid", "artifact", "model", "checkpoint")
_WITH_FILES = (*_ONLY_FILES, "note")


class DeliveryState(TypedDict):
    """The content of ``outbox.json``."""

    delivered: int
    """Bytes of ``outbox.jsonl``."""
    run_id: NotRequired[str]
    """MLflow's id of the run, once the run exists there."""
    files: NotRequired[int]
    """Where files begin if there is no ``outbox.files.json``: earlier versions had one lane and no such file."""


class RefusedFile(TypedDict):
    """A file that was refused and will be tried again."""

    start: int
    """Byte of ``outbox.jsonl`` at which its record starts."""
    tried: float
    """Time of the latest attempt, in seconds since 1970."""
    tries: int
    file: str
    """Its path in the run's folder."""
    reason: str


class FilesState(TypedDict):
    """The content of ``outbox.files.json``."""

    delivered: int
    refused: list[RefusedFile]


Send = Callable[[Sequence[Record], DeliveryState], int]
"""Sends one or more of the given records, oldest first, and returns how many. It may change the state, which is saved
before the next call. If it raises, none counts as sent."""

SendFile = Callable[[Record, str], None]
"""Sends the file of a record to the run with this id. Raises ``Refused`` if the store refuses this file while the
tracking server answers; any other exception ends the delivery, and the file is the next one again."""


class Refused(Exception):
    """The artifact store refuses a file."""


class OutboxBusy(OSError):
    """Another process or thread delivers from this outbox."""


class Outbox:
    """The outbox in the folder of a run. Processes that write to it take turns, see ``Journal``."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "outbox.jsonl")
        self._state_file, self._files_state_file = (folder / name for name in POSITIONS)
        self._lock_file, self._files_lock_file = folder / ".outbox.lock", folder / ".outbox.files.lock"

    def put(self, record: Record) -> None:
        """Queue ``record``."""
        self.journal.append(record)

    def state(self) -> DeliveryState:
        """The saved state; without one, or with a damaged one, nothing was delivered."""
        loaded: DeliveryState | None = self._load(self._state_file)
        state: DeliveryState = loaded or {"delivered": 0}
        state.setdefault("files", state["delivered"])
        return state

    def save_state(self, state: DeliveryState) -> None:
        atomic_write(self._state_file, json.dumps(state).encode())

    def refused_files(self) -> list[RefusedFile]:
        """The files that were refused, in the order they were queued."""
        return self._files_state()["refused"]

    def num_undelivered(self) -> int:
        """Number of records not known to be delivered."""
        points, files = self.state()["delivered"], self._files_state()
        refused = {entry["start"] for entry in files["refused"]}
        count, start = 0, min(points, files["delivered"], *refused)
        for record, end in self.journal.read(start):
            is_left = (_has_points(record) and end > points) or (
                _has_file(record) and (end > files["delivered"] or start in refused)
            )
            count, start = count + is_left, end
        return count

    def deliver_points(self, send: Send) -> None:
        """Deliver all queued points, oldest first.

        Raises:
            OutboxBusy: another process or thread has been delivering points for ten seconds.
            Exception: any that ``send`` raises; the records sent before it count as delivered.
        """
        with self._locked(self._lock_file):
            state = self.state()
            while batch := list(islice(self.journal.read(state["delivered"]), _RECORDS_AT_ONCE)):
                points = [(record, end) for record, end in batch if _has_points(record)]
                num_sent = send([record for record, _ in points], state) if points else 0
                assert num_sent <= len(points)
                assert num_sent or not points
                # What follows the last point needs no request.
                state["delivered"] = batch[-1][1] if num_sent == len(points) else points[num_sent - 1][1]
                self.save_state(state)

    def deliver_files(self, send: SendFile, patient: bool = False) -> float | None:
        """Deliver queued files, oldest first, then try refused ones again.

        A file that is refused stays for a later call, and the next one is sent. Does nothing before the run exists in
        MLflow.

        Args:
            patient: wait longer between the attempts for a file the more often it was refused.

        Returns:
            The seconds until the next refused file is due, None if there is none.

        Raises:
            OutboxBusy: another process or thread has been delivering files for ten seconds.
            Exception: any but ``Refused`` that ``send`` raises.
        """
        with self._locked(self._files_lock_file):
            run_id, state = self.state().get("run_id"), self._files_state()
            if run_id is None:
                return None
            known = {entry["start"] for entry in state["refused"]}
            refusing = 0.0
            try:
                for record, start, end in self._due_files(state, patient):
                    began = time.monotonic()
                    if _send_file(send, record, start, run_id, state):
                        refusing += time.monotonic() - began
                    state["delivered"] = max(state["delivered"], end)
                    self._save_files_state(state)
                    if refusing > _REFUSING_SECONDS:
                        break
                self._save_files_state(state)
            finally:
                if new := [entry for entry in state["refused"] if entry["start"] not in known]:
                    say(f"warning: MLflow refuses {describe_refused(new)}; this is tried again later")
            next_due = min((_due(entry) for entry in state["refused"]), default=None)
            return None if next_due is None else max(next_due - time.time(), _RETRY_SECONDS)

    def _due_files(self, state: FilesState, patient: bool) -> Iterator[tuple[Record, int, int]]:
        """The records of new files, then of refused ones, the longest untried first, each with its start and end."""
        due = [entry for entry in state["refused"] if not patient or _due(entry) <= time.time()]
        start = state["delivered"]
        for record, end in self.journal.read(start):
            if _has_file(record):
                yield record, start, end
            start = end
        state["delivered"] = start
        for entry in sorted(due, key=lambda entry: entry["tried"]):
            record, end = next(self.journal.read(entry["start"]))
            yield record, entry["start"], end

    def _files_state(self) -> FilesState:
        loaded: FilesState | None = self._load(self._files_state_file)
        return loaded or {"delivered": self.state()["files"], "refused": []}

    def _save_files_state(self, state: FilesState) -> None:
        atomic_write(self._files_state_file, json.dumps(state).encode())

    def _load(self, path: Path) -> Any:
        """The state of a lane. None if it is missing, damaged, or ahead of the log, which a power cut may truncate."""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        size = self.journal.path.stat().st_size if self.journal.path.exists() else 0
        return state if state["delivered"] <= size else None

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        if not self.journal.path.exists():
            yield
            return
        try:
            lock = FileLock(path).acquire(_LOCK_SECONDS)
        except Timeout:
            raise OutboxBusy("another process or thread is delivering the same records") from None
        with lock:
            yield


def _send_file(send: SendFile, record: Record, start: int, run_id: str, state: FilesState) -> bool:
    """Send a file, and note in the state whether it was refused. Returns that."""
    tries = 1 + sum(entry["tries"] for entry in state["refused"] if entry["start"] == start)
    state["refused"] = [entry for entry in state["refused"] if entry["start"] != start]
    try:
        send(record, run_id)
    except Refused as error:
        file, reason = record.get("path", "events.txt"), str(error)
        state["refused"].append({"start": start, "tried": time.time(), "tries": tries, "file": file, "reason": reason})
        state["refused"].sort(key=lambda entry: entry["start"])
        return True
    return False


def _due(entry: RefusedFile) -> float:
    """When to try a refused file again, in seconds since 1970."""
    return entry["tried"] + min(_RETRY_SECONDS * 2 ** (entry["tries"] - 1), _LONGEST_RETRY_SECONDS)


def describe_refused(refused: Sequence[RefusedFile]) -> str:
    """Refused files for messages: the first ones by name, and why the latest of them was refused."""
    names = list(dict.fromkeys(entry["file"] for entry in refused))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more} ({max(refused, key=lambda entry: entry['tried'])['reason']})"


def _has_points(record: Record) -> bool:
    return record["kind"] not in _ONLY_FILES


def _has_file(record: Record) -> bool:
    return record["kind"] in _WITH_FILES


class DeliveryThread:
    """A thread that delivers the records of an outbox as they are queued and retries while the receiver is away."""

    def __init__(
        self,
        deliver: Callable[[], float | None],
        receiver: str,
        what: str,
        errors: Callable[[], tuple[type[Exception], ...]],
    ) -> None:
        """Starts at once, with the records that earlier processes left.

        Args:
            deliver: delivers what is queued. It may return the seconds after which it is to be called again.
            receiver, what: their names in messages.
            errors: what ``deliver`` raises while the receiver is away. Any other exception is a bug: the thread ends
                with a traceback, and the records stay on disk.
        """
        self._deliver_queued, self._errors = deliver, errors
        self._receiver, self._what = receiver, what
        self._new_records, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._new_records.set()
        # A daemon, so that a server that never answers cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """New records were queued."""
        self._new_records.set()

    def close(self, timeout: float) -> None:
        """Try once more to deliver all queued records, then end the thread; wait for it ``timeout`` seconds at most."""
        self._closing.set()
        self._new_records.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        last, pause = False, None
        while not last:
            self._new_records.wait(pause)
            self._new_records.clear()
            last = self._closing.is_set()
            pause = self._deliver()
            if self._failing:
                self._closing.wait(_RETRY_SECONDS)
                self._new_records.set()

    def _deliver(self) -> float | None:
        """Deliver; print one line when delivery begins to fail and one when it works again. Returns the seconds until
        the next call."""
        try:
            pause = self._deliver_queued()
        except self._errors() as error:
            if not self._failing:
                say(
                    f"warning: {self._receiver} accepts no {self._what} ({brief(error)}); they are kept on disk and"
                    " retried"
                )
            self._failing = True
            return None
        if self._failing:
            say(f"{self._receiver} accepts {self._what} again")
        self._failing = False
        return pause
