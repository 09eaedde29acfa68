"""Processes to share work on pictures with, which never outlive their use."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection


@contextlib.contextmanager
def workers(processes: int, module: str) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes are gone when the block is left, whatever they are at, and when this process is killed.

    ``ProcessPoolExecutor`` alone would first finish what is queued, and its processes would wait for a killed parent
    for ever. ``module`` is imported once for all of them. A script that calls this needs the usual
    ``if __name__ == "__main__":``.
    """
    # A fork of this process would copy the locks of its threads (tqdm has one) in whatever state they are.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    leash, hand = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start, (leash,))
    try:
        yield pool
    finally:
        hand.close()
        pool.shutdown(cancel_futures=True)
        leash.close()


def _start(leash: Connection) -> None:
    """Leave Ctrl-C to the parent, and leave when it lets go of the leash, be it by its death.

    libtiff writes about damaged files straight to stderr, where the parent's progress is; nobody needs it.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave() -> None:
        multiprocessing.connection.wait([leash])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
