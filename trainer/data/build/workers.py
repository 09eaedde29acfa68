"""Threads and processes for the work on images, with results in order and nothing left running afterwards."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TypeVar

from catgan.machine import shorten_tmpdir

T = TypeVar("T")
R = TypeVar("R")


def map_ordered(function: Callable[[T], R], items: Iterable[T], pool: Executor | None, ahead: int) -> Iterator[R]:
    """``function`` of each item, in order. None as ``pool`` runs it in the caller's thread, one item at a time.

    ``Executor.map`` takes all items at once; this one takes an item only when fewer than ``ahead`` results are
    pending, which bounds the memory.
    """
    if pool is None:
        yield from map(function, items)
        return
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def worker_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that cancels what is queued, and waits for what is running, when the block ends."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def worker_processes(processes: int, module: str) -> Iterator[ProcessPoolExecutor]:
    """A process pool whose processes exit at once when the block ends or this process is killed. They do not get the
    Ctrl-C that a terminal sends to them, too.

    ``ProcessPoolExecutor`` alone would first finish what is queued, and its processes would outlive a killed parent.
    A script that uses this needs the usual ``if __name__ == "__main__":``.

    Args:
        module: imported once, in the fork server, for all processes.
    """
    shorten_tmpdir()  # the fork server uses sockets
    # A plain fork would copy the locks of this process's threads (tqdm has one) in whatever state they are.
    context = _Context()
    context.set_forkserver_preload([module])
    # The parent holds the only writing end. Closing it, or the parent's death, wakes the processes that read.
    exit_reader, exit_writer = multiprocessing.Pipe(duplex=False)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _start_process, (exit_reader,))
    try:
        yield pool
    finally:
        exit_writer.close()
        # A process that is still starting would print a traceback if it did not find the queues of the pool any more.
        for process in set(multiprocessing.active_children()) - others:
            process.join()
        # A process may have ended while it sent a result. The pool's thread would read the rest of it forever, since
        # the pool itself has the pipe open for writing; now it finds the end and shuts down.
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        pool.shutdown(cancel_futures=True)
        exit_reader.close()


class _Process(ForkServerProcess):
    def start(self) -> None:
        resource_tracker.ensure_running()  # unblocks Ctrl-C when it starts
        with _ctrl_c_later():
            super().start()  # the first one starts the fork server, from which all inherit that Ctrl-C is blocked


class _Context(ForkServerContext):
    Process = _Process


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Block Ctrl-C, and handle it at the end of the block."""
    is_main = threading.current_thread() is threading.main_thread()  # the one that Python interrupts
    requests: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: requests.append(number)) if is_main else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    if requests:
        signal.raise_signal(signal.SIGINT)


def _start_process(exit_reader: Connection) -> None:
    """Exit when the other end of ``exit_reader`` is closed.

    stderr is discarded: libtiff writes about damaged files straight to it, into the parent's progress bar.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([exit_reader])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
