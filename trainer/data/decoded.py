"""Decoded training images in shared memory, so that later epochs decode nothing.

The memory is a file in ``/dev/shm``, named by the digest of the data set. All ranks on a machine use the same file, and
a training that restarts after being killed finds the images of its predecessor. The last process that uses the file
deletes it.
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
from catgan.dataset import Manifest
from catgan.files import is_at
from trainer.distributed import shared_memory as shm

_UNKNOWN, _READY, _BROKEN = 0, 1, 2
_LABEL = np.int32


class DecodedImages:
    """Images of a train split, uint8 ``[images, 3, size, size]``, each with a state (unknown, ready or broken) and, if
    there are classes, with the number of its class.

    An image's index is its position in the concatenated shards. No lock is needed for writing: processes that decode
    the same image write the same bytes.

    Args:
        path: file in shared memory, created if necessary.
        images: number of images.
        size: side of an image in pixels.
        is_owner: lock the file, so that it is not deleted before this object is; a reader process does not need to,
            because the process that started it does.
        labelled: whether there are classes.

    Raises:
        OSError: there is not enough memory, or the file belongs to another user.
    """

    def __init__(self, path: Path, images: int, size: int, *, is_owner: bool = True, labelled: bool = False) -> None:
        self.path, self.images, self.size, self.labelled = path, images, size, labelled
        length = num_bytes(images, size, labelled)
        file = _open_locked(path) if is_owner else shm.open_private(path)
        try:
            shm.reserve(file, length)
            memory = mmap.mmap(file, length)
        except OSError:
            shm.remove_if_unused(file, path)
            raise
        self._states = np.frombuffer(memory, np.uint8, images)
        pixels = np.frombuffer(memory, np.uint8, images * 3 * size * size, offset=images)
        self._pixels = pixels.reshape(images, 3, size, size)
        after = images + pixels.size
        labels = np.frombuffer(memory, np.uint8, offset=after) if labelled else np.empty(0, np.uint8)
        self._labels = labels.view(_LABEL)  # bytes first: numpy refuses an offset that is not a multiple of the item
        weakref.finalize(self, _close, file, path, os.getpid())

    def __reduce__(self) -> tuple[Callable[..., DecodedImages], tuple[Path, int, int, bool]]:
        """Pickle for a reader process, which maps the same file."""
        return _open_in_reader, (self.path, self.images, self.size, self.labelled)

    def get(self, index: int) -> np.ndarray | None:
        """An image, uint8 ``[3, size, size]``, as a view of the memory; None unless it is ready."""
        if self._states[index] != _READY:
            return None
        shm.fence()
        return self._pixels[index]

    def label(self, index: int) -> int:
        """The number of the class of an image that is ready; -1 if there are no classes."""
        return int(self._labels[index]) if self.labelled else -1

    def put(self, index: int, pixels: np.ndarray, label: int = -1) -> None:
        self._pixels[index] = pixels
        if self.labelled:
            self._labels[index] = label
        shm.fence()
        self._states[index] = _READY

    def put_broken(self, index: int) -> None:
        """Mark an image as impossible to decode."""
        if self._states[index] == _UNKNOWN:
            self._states[index] = _BROKEN

    def is_broken(self, index: int) -> bool:
        return bool(self._states[index] == _BROKEN)

    def is_complete(self, indices: range) -> bool:
        """Whether each of these images is ready or broken, so that their shard need not be read."""
        return bool((self._states[indices.start : indices.stop] != _UNKNOWN).all())


def num_bytes(images: int, size: int, labelled: bool = False) -> int:
    """Memory for so many RGB images of ``size`` x ``size`` pixels and their states, and classes if ``labelled``."""
    return images * (1 + 3 * size * size + (np.dtype(_LABEL).itemsize if labelled else 0))


def open_decoded(manifest: Manifest, budget: int, labelled: bool = False) -> DecodedImages | None:
    """Shared memory for the train split; None if it needs more than ``budget`` bytes, or more than the machine has.

    Trainings with and without classes do not share it: what one has decoded, the other would have to read again.
    """
    images, size = manifest.splits["train"].images, manifest.size
    needed = num_bytes(images, size, labelled)
    if not 0 < needed <= budget:
        return None
    path = shm.FOLDER / f"{shm.PREFIX}{manifest.digest[:32]}{'-classes' if labelled else ''}"
    shm.remove_abandoned(keep=path)
    try:
        return DecodedImages(path, images, size, labelled=labelled)
    except OSError as error:
        say(f"images are decoded in every epoch: no room for them in {shm.FOLDER} ({needed >> 20:,} MiB): {error}")
        return None


def _open_in_reader(path: Path, images: int, size: int, labelled: bool) -> DecodedImages:
    return DecodedImages(path, images, size, is_owner=False, labelled=labelled)


def _open_locked(path: Path) -> int:
    """Open or create the file with a shared lock, which lasts until its descriptor is closed."""
    while True:
        file = shm.open_private(path)
        fcntl.flock(file, fcntl.LOCK_SH)
        if is_at(path, file):
            return file
        os.close(file)  # its last user deleted it before it could be locked


def _close(file: int, path: Path, pid: int) -> None:
    """Unlock the file, and delete it if no other process has it locked. Memory that is still mapped stays valid."""
    if os.getpid() == pid:  # not in a forked reader, which has inherited the lock
        shm.remove_if_unused(file, path)
