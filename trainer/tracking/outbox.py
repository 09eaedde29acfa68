"""Deliveries to a server that may be slow or away, without holding up whoever has something to send.

Two files in a folder. ``outbox.jsonl`` is a journal of all that is to be sent; it only grows. ``outbox.json`` says how
far it was delivered and holds what the receiver wants remembered. A process that is killed between the server's answer
and that note sends the same records again, so each must mean the same when it comes twice (see
``trainer.tracking.delivery``).
Nothing is lost with ``outbox.json``: without it everything is sent once more. ``.outbox.lock`` is held by whoever
delivers; it stays where it is.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from catgan.command import say
from catgan.files import atomic_write
from trainer.tracking.journal import Journal, Record

Memo = dict[str, Any]

Send = Callable[[Sequence[Record], Memo], int]
"""Sends some of the oldest records and returns how many, at least one; any exception means that none was taken. What it
puts into the memo is on disk before it is called again."""

_AT_ONCE = 200
_RETRY_SECONDS = 5.0
_LOCK_SECONDS = 10.0


class Busy(OSError):
    """Another process delivers from this outbox."""


class Outbox:
    """The outbox in a folder, shared by the processes that take turns to write to it."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "outbox.jsonl")
        self._memo = folder / "outbox.json"
        self._lock = folder / ".outbox.lock"

    def put(self, record: Record) -> None:
        self.journal.append(record)

    def memo(self) -> Memo:
        """What the receiver remembers, and ``delivered``: how many bytes of the journal."""
        try:
            memo = json.loads(self._memo.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {"delivered": 0}
        # After a power cut the journal may have lost its end.
        size = self.journal.path.stat().st_size if self.journal.path.exists() else 0
        return memo if memo["delivered"] <= size else memo | {"delivered": 0}

    def remember(self, memo: Memo) -> None:
        atomic_write(self._memo, json.dumps(memo).encode())

    def left(self) -> int:
        """Records not known to be delivered."""
        return sum(1 for _ in self.journal.read(self.memo()["delivered"]))

    def deliver(self, send: Send) -> int:
        """Deliver what is there, oldest first; returns how many records that were.

        Raises:
            Busy: another process is at it for longer than a few seconds.
            Exception: whatever ``send`` raises; what was delivered until then is noted.
        """
        count = 0
        with self._locked():
            memo = self.memo()
            while batch := list(islice(self.journal.read(memo["delivered"]), _AT_ONCE)):
                done = send([record for record, _ in batch], memo)
                assert 1 <= done <= len(batch)
                memo["delivered"] = batch[done - 1][1]
                self.remember(memo)
                count += done
        return count

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.journal.path.exists():
            yield
            return
        try:
            lock = FileLock(self._lock).acquire(_LOCK_SECONDS)
        except Timeout:
            raise Busy("another process is delivering the same records") from None
        with lock:
            yield


class Courier:
    """A thread that delivers what is put into an outbox, and tries again while the receiver is away."""

    def __init__(self, outbox: Outbox, send: Send, name: str, failures: tuple[type[Exception], ...]) -> None:
        """Begins at once with what is there from before.

        Args:
            name: whom messages speak of.
            failures: what ``send`` raises when the receiver is away. Anything else is a bug: it shows its traceback and
                ends the thread, and the records stay on disk.
        """
        self._outbox, self._send, self._name, self._failures = outbox, send, name, failures
        self._awake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._awake.set()
        # A daemon: a server that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._awake.set()

    def close(self, seconds: float) -> None:
        """Deliver what is left unless the receiver is away, for so many seconds at the most."""
        self._closing.set()
        self._awake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        last = False
        while not last:
            self._awake.wait()
            self._awake.clear()
            last = self._closing.is_set()
            self._deliver()
            if self._failing:
                self._closing.wait(_RETRY_SECONDS)
                self._awake.set()

    def _deliver(self) -> None:
        """Say it once when deliveries begin to fail, and once when they succeed again."""
        try:
            self._outbox.deliver(self._send)
        except self._failures as error:
            if not self._failing:
                say(f"{self._name} does not take records ({brief(error)}); they are kept and sent later")
            self._failing = True
            return
        if self._failing:
            say(f"{self._name} takes records again")
        self._failing = False


def redact(text: str) -> str:
    """Without the user and password of a URL."""
    return re.sub(r"://[^/?#\s]*@", "://", text)


def brief(error: BaseException) -> str:
    """An error as one short line. Clients wrap "Connection refused" in a paragraph, so the innermost cause speaks if
    it is the operating system's."""
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    text = str(cause) if isinstance(cause, OSError) else str(error)
    text = redact(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
