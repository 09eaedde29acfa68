"""Decoded pictures in memory that all readers of a machine share, so that later epochs cost no decoding.

The memory is a file in the system's shared memory (``/dev/shm``), named by the data set: the ranks of a training find
each other's pictures there, and a training that is restarted on this machine finds those of its predecessor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from catgan.command import say
from catgan.files import is_at
from trainer.data.manifest import Manifest
from trainer.distributed import shared_memory as shm

_UNKNOWN, _READY, _BROKEN = 0, 1, 2


class DecodedPictures:
    """The pictures of the train split, uint8 ``[images, 3, size, size]``, each with a mark: unknown, ready or broken.

    Everything goes by the picture's number in the concatenated shards. Two readers may decode the same picture at the
    same time; both write the same bytes. Travels to reader processes by fork or pickle.
    """

    def __init__(self, path: Path, images: int, size: int, *, owner: bool = True) -> None:
        self.path, self.images, self.size = path, images, size
        length = images * (1 + 3 * size * size)
        file = shm.open_private(path)
        try:
            if owner:
                fcntl.flock(file, fcntl.LOCK_SH)
                while not is_at(path, file):  # whoever left last has removed it before it could be locked
                    os.close(file)
                    file = shm.open_private(path)
                    fcntl.flock(file, fcntl.LOCK_SH)
            shm.reserve(file, length)
            memory = mmap.mmap(file, length)
        except OSError:
            shm.remove_if_unused(file, path)
            raise
        self._marks = np.frombuffer(memory, np.uint8, images)
        self._pixels = np.frombuffer(memory, np.uint8, offset=images).reshape(images, 3, size, size)
        weakref.finalize(self, _leave, file, path, os.getpid())

    def __reduce__(self) -> tuple[Callable[..., DecodedPictures], tuple[Path, int, int]]:
        return _reopen, (self.path, self.images, self.size)

    def get(self, number: int) -> np.ndarray | None:
        """A picture, uint8 ``[3, size, size]``, without copying it; None if it is not there."""
        if self._marks[number] != _READY:
            return None
        shm.fence()
        return self._pixels[number]

    def put(self, number: int, pixels: np.ndarray) -> None:
        self._pixels[number] = pixels
        shm.fence()
        self._marks[number] = _READY

    def put_broken(self, number: int) -> None:
        if self._marks[number] == _UNKNOWN:
            self._marks[number] = _BROKEN

    def is_broken(self, number: int) -> bool:
        return bool(self._marks[number] == _BROKEN)

    def is_known(self, numbers: range) -> bool:
        """Whether of each of these pictures there is no more to be learned."""
        return bool((self._marks[numbers.start : numbers.stop] != _UNKNOWN).all())


def decoded_pictures(manifest: Manifest, budget: int) -> DecodedPictures | None:
    """Shared memory for the train split, or None if it takes more than ``budget`` bytes or than the machine has."""
    images, size = manifest.splits["train"].images, manifest.size
    needed = images * (1 + 3 * size * size)
    if not 0 < needed <= budget:
        return None
    path = shm.FOLDER / f"{shm.PREFIX}{manifest.digest[:32]}"
    shm.sweep(keep=path)
    try:
        return DecodedPictures(path, images, size)
    except OSError as error:
        say(
            f"decoding in every epoch: no room for the decoded pictures ({needed >> 20:,} MiB in {shm.FOLDER}): {error}"
        )
        return None


def _reopen(path: Path, images: int, size: int) -> DecodedPictures:
    return DecodedPictures(path, images, size, owner=False)


def _leave(file: int, path: Path, pid: int) -> None:
    """The owner that leaves last removes the file; who still has it mapped keeps the memory."""
    if os.getpid() == pid:  # not in a forked reader, which shares the owner's lock
        shm.remove_if_unused(file, path)
