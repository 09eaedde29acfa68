"""Deliveries to a server that may be slow or away for a while, without holding up whoever has something to send."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from infer.command import say


class Outbox:
    """Jobs done one after the other in a thread. One that fails goes to the back and waits for the next ``put``, so a
    single job that can never succeed does not keep the others back."""

    def __init__(self, name: str) -> None:
        """``name`` is whom messages speak of."""
        self._name = name
        self._jobs: deque[Callable[[], object]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._delivery: Future[None] | None = None
        self._failing = False

    def put(self, job: Callable[[], object]) -> None:
        """Have ``job`` done soon; any exception of it counts as a failed delivery."""
        self._jobs.append(job)
        self._deliver()

    def flush(self, seconds: float) -> bool:
        """Whether all jobs were done within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._jobs or not self._idle():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            if self._failing:
                time.sleep(min(1.0, remaining))
            self._deliver()
            assert self._delivery is not None
            wait([self._delivery], timeout=remaining)
        self._note()
        return True

    def close(self, seconds: float) -> None:
        """Finish, within ``seconds``; what is undone then is given up."""
        if not self.flush(seconds):
            say(f"{self._name} did not take all of the last records; the run's folder has them")
        self._jobs.clear()
        self._thread.shutdown(wait=False)

    def _idle(self) -> bool:
        return self._delivery is None or self._delivery.done()

    def _deliver(self) -> None:
        if self._idle():
            self._note()
            self._delivery = self._thread.submit(self._run)

    def _run(self) -> None:
        while self._jobs:
            job = self._jobs.popleft()
            done = False
            try:
                job()
                done = True
            finally:
                if not done:
                    self._jobs.append(job)

    def _note(self) -> None:
        """Say it once when deliveries begin to fail, and once when they succeed again."""
        error = self._delivery.exception() if self._delivery is not None else None
        if error is not None and not self._failing:
            say(f"{self._name} does not take records ({brief(error)}); trying again while training goes on")
        if error is None and self._failing:
            say(f"{self._name} takes records again")
        self._failing = error is not None


def redact(text: str) -> str:
    """Without the user and password of a URL."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def brief(error: BaseException) -> str:
    """An error as one short line. Clients wrap "Connection refused" in a paragraph, so the innermost cause speaks if
    it is the operating system's."""
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    text = str(cause) if isinstance(cause, OSError) else str(error)
    text = redact(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
