"""Sums over the ranks of one machine in shared memory.

Over gloo these ranks talk by TCP, and each collective wakes threads on both sides, which can take as long as a layer of
a small network. Trainings with several CPU workers on one machine need this: batch norm over ranks does a collective
per layer. Here each rank writes its values into shared memory, increments its counter, and spins until all counters
match.
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

from trainer.distributed import shared_memory

CHUNK = 1 << 17  # values per exchange: 512 KiB, so that the buffers of two ranks stay in a core's cache
_COUNTER_STRIDE = 8  # counters are 64 bytes apart: one cache line each
_SPINS = 1000  # reads of another rank's counter before sleeping between them; about a millisecond
_SLEEP = 1e-4  # seconds
_TIMEOUT = 1800.0  # seconds, as gloo's


class SharedSums:
    """Sums float32 tensors in the order of ranks, so that all ranks get the same bits. ``add`` and ``average`` are
    collectives.

    The buffers are double-buffered: a rank reuses one only after all ranks have incremented their counters once more,
    and thus have read it. Each rank locks one byte of the file until its process ends, which tells the others whether
    it is alive.

    Args:
        file: descriptor of a file with ``length(world_size)`` zero bytes, opened by this rank alone; closed with this
            object.

    Raises:
        OSError: it cannot be locked or mapped.
    """

    def __init__(self, file: int, rank: int, world_size: int) -> None:
        weakref.finalize(self, os.close, file)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self.file, self.rank = file, rank
        memory, counters = mmap.mmap(file, self.length(world_size)), world_size * _COUNTER_STRIDE * 8
        self._counters = memoryview(memory)[:counters].cast("q")
        self._buffers = np.frombuffer(memory, np.float32, offset=counters).reshape(2, world_size, CHUNK)
        self._others = [r for r in range(world_size) if r != rank]
        self._exchange = 0

    @staticmethod
    def length(world_size: int) -> int:
        """Bytes of the file."""
        return world_size * (_COUNTER_STRIDE * 8 + 2 * CHUNK * 4)

    def add(self, x: Tensor, divisor: int = 1) -> Tensor:
        """Replace ``x``, contiguous float32, by the sum over ranks of ``x / divisor``.

        Raises:
            RuntimeError: another rank has ended, or did not call this within half an hour.
        """
        assert x.dtype == torch.float32, x.dtype
        values = x.detach().view(-1).numpy()  # NumPy's overhead per operation is smaller than PyTorch's
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            self._exchange += 1
            buffer = self._buffers[self._exchange % 2, :, : len(part)]
            np.divide(part, divisor, out=buffer[self.rank])
            shared_memory.fence()
            self._counters[self.rank * _COUNTER_STRIDE] = self._exchange
            for other in self._others:
                self._wait_for(other)
            shared_memory.fence()
            np.add(buffer[0], buffer[1], out=part)
            for others in buffer[2:]:
                part += others
        return x

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean of gradients: a communication hook of DistributedDataParallel."""
        mean: torch.futures.Future[Tensor] = torch.futures.Future()
        mean.set_result(self.add(bucket.buffer(), divisor=len(self._others) + 1))
        return mean

    def _wait_for(self, other: int) -> None:
        """Wait until the counter of that rank has reached this exchange. At first yields the core without sleeping:
        waking up takes longer than most waits, on virtual machines above all."""
        for _ in range(_SPINS):
            if self._counters[other * _COUNTER_STRIDE] >= self._exchange:
                return
            os.sched_yield()
        began = checked = time.monotonic()
        while self._counters[other * _COUNTER_STRIDE] < self._exchange:
            time.sleep(_SLEEP)
            now = time.monotonic()
            if now - checked > 1:
                self._check_alive(other, now - began)
                checked = now

    def _check_alive(self, other: int, waited: float) -> None:
        if waited > _TIMEOUT:
            raise RuntimeError(f"waited for rank {other} for {waited / 60:.0f} minutes")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, other)
        except OSError:
            return  # it holds its lock, or a third rank is checking it at this moment
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, other)
        if self._counters[other * _COUNTER_STRIDE] < self._exchange:
            raise RuntimeError(f"rank {other} has ended")


_sums_by_group: weakref.WeakKeyDictionary[dist.ProcessGroup, SharedSums | None] = weakref.WeakKeyDictionary()


def shared_sums() -> SharedSums | None:
    """Shared-memory sums for this training, or None unless its ranks are several on one machine, use gloo, and there is
    room in shared memory. The first call is a collective."""
    group = dist.group.WORLD
    if group is None:
        return None
    if group not in _sums_by_group:
        is_for_gloo = dist.get_world_size() > 1 and dist.get_backend() == dist.Backend.GLOO
        _sums_by_group[group] = _open() if is_for_gloo else None
    return _sums_by_group[group]


def _open() -> SharedSums | None:
    """All ranks map a file that rank 0 makes, or none does. Ranks that find the file by its random name share the
    memory of one machine, whatever containers they run in."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    path = shared_memory.FOLDER / f"{shared_memory.PREFIX}sums-{secrets.token_hex(16)}"
    file = _create(path, SharedSums.length(world_size)) if rank == 0 else None
    try:
        box = [path]
        dist.broadcast_object_list(box, src=0)
        path = box[0]
        sums = _map(path, file, rank, world_size)
        num_mapped = torch.tensor([int(sums is not None)])
        dist.all_reduce(num_mapped)
        return sums if num_mapped.item() == world_size else None
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)


def _create(path: Path, length: int) -> int | None:
    """The file, open and locked as in use for ``shared_memory.remove_abandoned``; None if there is no room."""
    try:
        file = shared_memory.open_private(path)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            shared_memory.reserve(file, length)
        except OSError:
            os.close(file)
            path.unlink()
            raise
    except OSError:
        return None
    return file


def _map(path: Path, file: int | None, rank: int, world_size: int) -> SharedSums | None:
    """``file`` is rank 0's descriptor. It must not open the file twice: closing one descriptor would release all of the
    process's locks on it."""
    try:
        if rank:
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return None if file is None else SharedSums(file, rank, world_size)
    except OSError:
        return None
