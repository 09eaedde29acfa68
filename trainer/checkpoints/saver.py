"""Keeping checkpoints and the best generator while training goes on; on rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from catgan.command import UserError
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage

BEST = "best/gen.safetensors"

_FINAL_TRIES = 3
_PAUSE = 5.0  # seconds between them


class Saver:
    """Saves checkpoints in a thread, one at a time, and keeps the two latest.

    A full disk or a bucket that refuses does not stop the training: the last good checkpoint stays, ``warn`` is called
    (in the thread that calls ``save``, ``poll`` or ``finish``), and the next save tries again. After a save ``saved``
    is called there with the names of the checkpoints that are kept.
    """

    def __init__(self, storage: Storage, warn: Callable[[str], None], saved: Callable[[list[str]], None]) -> None:
        self._storage, self._warn, self._saved = storage, warn, saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._job: Future[None] | None = None
        self._best: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._unsaved: tuple[int, dict[str, Any]] | None = None
        self._kept: str | None = None
        self._names: list[str] = []

    def save(self, nimg: int, state: dict[str, Any]) -> None:
        """Save ``state`` as the checkpoint at ``nimg`` images. Returns when it is copied to main memory; waits for the
        save before."""
        self._collect()
        self._unsaved = nimg, _copy(state)
        self._job = self._thread.submit(self._run)

    def keep_best(self, weights: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Write these weights as the run's best generator with the next checkpoint."""
        self._collect()
        self._best = _copy(weights), info

    def poll(self) -> None:
        """Warn of a save that has failed meanwhile."""
        if self._job is not None and self._job.done():
            self._collect()

    def finish(self) -> None:
        """Wait until everything is saved.

        Raises:
            UserError: it failed several times.
        """
        for left in range(_FINAL_TRIES - 1, -1, -1):
            self._collect()
            if self._unsaved is None:
                return
            if left:
                time.sleep(_PAUSE)
                self._job = self._thread.submit(self._run)
        raise UserError(
            f"the last checkpoint cannot be saved in {self._storage.location}; make room, then run it again"
        )

    def _run(self) -> None:
        assert self._unsaved is not None
        nimg, state = self._unsaved
        if self._best is not None:
            self._storage.write(BEST, checkpoint.encode_generator(*self._best))
            self._best = None
        # The run's other files first: a checkpoint implies that everything up to its position is saved.
        self._storage.push()
        self._storage.save(checkpoint.folder_name(nimg), checkpoint.encode(state))
        self._kept, self._unsaved = checkpoint.folder_name(nimg), None
        self._prune(nimg)

    def _prune(self, nimg: int) -> None:
        """Delete all but the latest checkpoints, and those beyond ``nimg``, which were unreadable at resume."""
        names = self._storage.checkpoints()
        keep = [name for name in names if checkpoint.position(name) <= nimg][-checkpoint.NUM_TO_KEEP :]
        self._names = keep
        for name in set(names) - set(keep):
            self._storage.remove(name)
        self._storage.remove_incomplete()

    def _collect(self) -> None:
        """Wait for the save in progress."""
        if self._job is None:
            return
        job, self._job = self._job, None
        try:
            job.result()
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            if self._unsaved is None:
                self._warn(f"older checkpoints stay in {self._storage.location} ({reason}) until the next is saved")
                self._saved(self._names)
                return
            self._warn(
                f"checkpoint not saved in {self._storage.location} ({reason}); training continues with "
                f"{self._kept or 'what was there before'} as the last good one, and tries again at the next"
            )
        else:
            self._saved(self._names)


def _copy(value: Any) -> Any:
    """``value`` with its tensors copied to main memory, since training continues to change them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value
