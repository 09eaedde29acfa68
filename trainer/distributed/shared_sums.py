"""Sums between the ranks of one machine, through memory that they share.

Over gloo such ranks talk by TCP, and each collective wakes threads on either side, one after the other: that can take
as long as a layer of a small network. Here each rank writes its values, counts up, and looks until the others have.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import shared_memory as shm

CHUNK = 1 << 17  # values a rank shows at a time: 512 KiB, so that the sum of two ranks' stays in a core's cache
_LINE = 8  # counters are 64 bytes apart, so that each has a cache line of its own
_LOOKS = 1000  # at another rank's counter before pausing between them, about a millisecond
_PAUSE = 1e-4
_PATIENCE = 1800.0  # as gloo's


class SharedSums:
    """Adds what ranks hold, in the order of ranks, so that all get the same bits. ``add`` and ``average`` are
    collectives.

    There are two boards in turn: nobody can write on a board a second time before all have counted up once more, thus
    have read what was there. Each rank holds a lock on one byte of the file, which only its end releases.

    Args:
        file: of ``length(world_size)`` bytes of zeros, opened by this rank alone, and closed with this object.

    Raises:
        OSError: it cannot be locked or mapped.
    """

    def __init__(self, file: int, rank: int, world_size: int) -> None:
        weakref.finalize(self, os.close, file)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self.file, self.rank = file, rank
        memory, counters = mmap.mmap(file, self.length(world_size)), world_size * _LINE * 8
        self._counters = memoryview(memory)[:counters].cast("q")
        self._boards = np.frombuffer(memory, np.float32, offset=counters).reshape(2, world_size, CHUNK)
        self._others = [r for r in range(world_size) if r != rank]
        self._turn = 0

    @staticmethod
    def length(world_size: int) -> int:
        return world_size * (_LINE * 8 + 2 * CHUNK * 4)

    def add(self, x: Tensor, divisor: int = 1) -> Tensor:
        """Replace ``x``, contiguous float32, by its sum over ranks, of what each holds divided by ``divisor``.

        Raises:
            RuntimeError: another rank has ended, or did not come within half an hour.
        """
        assert x.dtype == torch.float32, x.dtype
        values = x.detach().view(-1).numpy()  # an operation on few values takes less time than PyTorch's
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            self._turn += 1
            board = self._boards[self._turn % 2, :, : len(part)]
            np.divide(part, divisor, out=board[self.rank])
            shm.fence()
            self._counters[self.rank * _LINE] = self._turn
            for other in self._others:
                self._await(other)
            shm.fence()
            np.add(board[0], board[1], out=part)
            for others in board[2:]:
                part += others
        return x

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean of gradients: a communication hook of DistributedDataParallel."""
        mean: torch.futures.Future[Tensor] = torch.futures.Future()
        mean.set_result(self.add(bucket.buffer(), divisor=len(self._others) + 1))
        return mean

    def _await(self, other: int) -> None:
        """Until that rank has counted up. The first looks yield the core without sleeping: waking up takes longer than
        most waits, on virtual machines above all."""
        for _ in range(_LOOKS):
            if self._counters[other * _LINE] >= self._turn:
                return
            os.sched_yield()
        began = checked = time.monotonic()
        while self._counters[other * _LINE] < self._turn:
            time.sleep(_PAUSE)
            now = time.monotonic()
            if now - checked > 1:
                self._check_alive(other, now - began)
                checked = now

    def _check_alive(self, other: int, waited: float) -> None:
        if waited > _PATIENCE:
            raise RuntimeError(f"waited for rank {other} for {waited / 60:.0f} minutes")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, other)
        except OSError:
            return  # it holds its lock, or another rank looks just now
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, other)
        if self._counters[other * _LINE] < self._turn:
            raise RuntimeError(f"rank {other} has ended")


_met: weakref.WeakKeyDictionary[dist.ProcessGroup, SharedSums | None] = weakref.WeakKeyDictionary()


def shared_sums() -> SharedSums | None:
    """What adds for the ranks of this training, or None unless they are several on one machine that communicate over
    gloo, and the machine has room for it. The first call is a collective."""
    group = dist.group.WORLD
    if group is None:
        return None
    if group not in _met:
        _met[group] = _meet() if dist.get_world_size() > 1 and dist.get_backend() == dist.Backend.GLOO else None
    return _met[group]


def _meet() -> SharedSums | None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    path = shm.FOLDER / f"{shm.PREFIX}sums-{secrets.token_hex(16)}"
    file = _make(path, SharedSums.length(world_size)) if rank == 0 else None
    try:
        box = [path]
        dist.broadcast_object_list(box, src=0)
        path = box[0]
        sums = _map(path, file, rank, world_size)
        # Who finds a file of this name shares the machine's memory, in whatever containers the ranks are.
        having = torch.tensor([int(sums is not None)])
        dist.all_reduce(having)
        return sums if having.item() == world_size else None
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)


def _make(path: Path, length: int) -> int | None:
    """The file, open and, for ``shm.sweep``, marked as used; None if there is no room."""
    try:
        file = shm.open_private(path)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            shm.reserve(file, length)
        except OSError:
            os.close(file)
            path.unlink()
            raise
    except OSError:
        return None
    return file


def _map(path: Path, file: int | None, rank: int, world_size: int) -> SharedSums | None:
    """``file`` is rank 0's; it is not opened twice, since closing it once would release all locks on it."""
    try:
        if rank:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return None if file is None else SharedSums(file, rank, world_size)
    except OSError:
        return None
