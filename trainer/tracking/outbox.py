"""A queue of records on disk, delivered in order to a server that may be slow or away.

In the run's folder:

- ``outbox.jsonl``: all records, in the order they were queued. It only grows.
- ``outbox.json``: the delivery state: how many bytes of ``outbox.jsonl`` were delivered, and MLflow's run id.
- ``.outbox.lock``: locked by the process that delivers. The file is never removed.

``Outbox.deliver`` sends the oldest records, saves the state, and continues with the next. A process killed between
the two sends the same records again, so sending a record twice must have the same effect as sending it once
(``trainer.tracking.delivery`` says how). It also follows that losing ``outbox.json`` loses nothing: all is sent again.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Required, TypedDict

from filelock import FileLock, Timeout

from catgan.command import say
from catgan.files import atomic_write
from trainer.tracking.journal import Journal, Record

_RECORDS_AT_ONCE = 200
_RETRY_SECONDS = 5.0
_LOCK_SECONDS = 10.0


class DeliveryState(TypedDict, total=False):
    """The content of ``outbox.json``."""

    delivered: Required[int]
    """Bytes of ``outbox.jsonl``."""
    run_id: str
    """MLflow's id of the run, once the run exists there."""
    notes: list[str]
    """The lines of the artifact ``events.txt`` so far."""


Send = Callable[[Sequence[Record], DeliveryState], int]
"""Sends one or more of the given records, oldest first, and returns how many. It may change the state, which is saved
before the next call. If it raises, none counts as sent."""


class OutboxBusy(OSError):
    """Another process delivers from this outbox."""


class Outbox:
    """The outbox in the folder of a run. Processes that write to it take turns, see ``Journal``."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "outbox.jsonl")
        self._state_file = folder / "outbox.json"
        self._lock_file = folder / ".outbox.lock"

    def put(self, record: Record) -> None:
        """Queue ``record``."""
        self.journal.append(record)

    def state(self) -> DeliveryState:
        """The saved state; without one, or with a damaged one, nothing was delivered."""
        try:
            state: DeliveryState = json.loads(self._state_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {"delivered": 0}
        size = self.journal.path.stat().st_size if self.journal.path.exists() else 0
        if state["delivered"] > size:  # a power cut may truncate the journal
            state["delivered"] = 0
        return state

    def save_state(self, state: DeliveryState) -> None:
        atomic_write(self._state_file, json.dumps(state).encode())

    def num_undelivered(self) -> int:
        """Number of records not known to be delivered."""
        return sum(1 for _ in self.journal.read(self.state()["delivered"]))

    def deliver(self, send: Send) -> int:
        """Deliver all queued records, oldest first. Returns their number.

        Raises:
            OutboxBusy: another process has been delivering for ten seconds.
            Exception: any that ``send`` raises; the records sent before it count as delivered.
        """
        count = 0
        with self._locked():
            state = self.state()
            while batch := list(islice(self.journal.read(state["delivered"]), _RECORDS_AT_ONCE)):
                num_sent = send([record for record, _ in batch], state)
                assert 1 <= num_sent <= len(batch)
                state["delivered"] = batch[num_sent - 1][1]
                self.save_state(state)
                count += num_sent
        return count

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.journal.path.exists():
            yield
            return
        try:
            lock = FileLock(self._lock_file).acquire(_LOCK_SECONDS)
        except Timeout:
            raise OutboxBusy("another process is delivering the same records") from None
        with lock:
            yield


class DeliveryThread:
    """A thread that delivers the records of an outbox as they are queued and retries while the receiver is away."""

    def __init__(self, outbox: Outbox, send: Send, receiver: str, errors: tuple[type[Exception], ...]) -> None:
        """Starts at once, with the records that earlier processes left.

        Args:
            receiver: its name in messages.
            errors: what ``send`` raises while the receiver is away. Any other exception is a bug: the thread ends with
                a traceback, and the records stay on disk.
        """
        self._outbox, self._send, self._receiver, self._errors = outbox, send, receiver, errors
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
        last = False
        while not last:
            self._new_records.wait()
            self._new_records.clear()
            last = self._closing.is_set()
            self._deliver()
            if self._failing:
                self._closing.wait(_RETRY_SECONDS)
                self._new_records.set()

    def _deliver(self) -> None:
        """Deliver; print one line when delivery begins to fail and one when it works again."""
        try:
            self._outbox.deliver(self._send)
        except self._errors as error:
            if not self._failing:
                say(f"warning: {self._receiver} accepts no records ({brief(error)}); they are kept on disk and retried")
            self._failing = True
            return
        if self._failing:
            say(f"{self._receiver} accepts records again")
        self._failing = False


def redact(text: str) -> str:
    """``text`` without the users and passwords of URLs in it."""
    return re.sub(r"://[^/?#\s]*@", "://", text)


def brief(error: BaseException) -> str:
    """An error as one line of about 200 characters at most, without passwords.

    HTTP clients wrap "Connection refused" in a paragraph, so if the innermost cause is an OSError its text is taken.
    """
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    text = str(cause) if isinstance(cause, OSError) else str(error)
    text = redact(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
