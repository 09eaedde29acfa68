"""Ctrl-C and SIGTERM while a training runs: the first one requests a checkpoint, a second one ends the process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from catgan.command import say

_AT_ONCE: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
_NAMES = {signal.SIGINT: ("Ctrl-C", "press Ctrl-C again"), signal.SIGTERM: ("SIGTERM", "send it again")}


class Stopped(SystemExit):
    """A training has ended after a stop request. The exit status is that of a process which the signal has ended: 130
    after Ctrl-C, 143 after SIGTERM."""


@contextmanager
def stop_requests(stop: Callable[[], object]) -> Iterator[None]:
    """Call ``stop`` at the first Ctrl-C or SIGTERM inside the block. A second one ends this process at once: Ctrl-C by
    KeyboardInterrupt, SIGTERM without any.

    A signal that this process ignores, as Ctrl-C in background jobs of a shell, stays ignored.

    Raises:
        Stopped: at the end of the block, after a stop request.
    """
    requests: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, _AT_ONCE[handled])
        requests.append(number)
        stop()  # before the message, which fails if the signal interrupts another one
        name, again = _NAMES[signal.Signals(number)]
        say(
            f"{name}: saving a checkpoint at the next tick, after an evaluation or upload that is running, then"
            f" exiting; {again} to stop at once"
        )

    before = {n: handler for n in _AT_ONCE if (handler := signal.getsignal(n)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if requests:
        raise Stopped(128 + requests[0])
