"""What a training starts from: the latest checkpoint of its run, a checkpoint of another one, given weights, or
nothing; and the lock that keeps a second training out of the same run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from catgan.command import UserError, say
from catgan.location import resolved_path
from trainer.checkpoints import checkpoint, transfer
from trainer.checkpoints.state import Position, check_fits, position_in
from trainer.checkpoints.storage import Storage, load_checkpoint, open_storage
from trainer.config import Config
from trainer.launch.options import Options, differences, texts
from trainer.loop import why_stopped
from trainer.step import GAN
from trainer.tracking import tracker as tracking

_LOCK = ".training.lock"
_LOCK_SECONDS = 10.0  # readers of a killed training hold its lock until they notice


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    checkpoint: str | None
    """Path or URL of the checkpoint that it continues from."""
    is_own: bool
    """Whether the checkpoint is one of this run, not of the one given as --resume."""
    position: Position
    """That of the checkpoint."""
    run_id: str | None
    """The run in MLflow, known from the run's own checkpoint."""
    init_from: Path | None
    """The run, checkpoint or file that a new run takes its weights from."""


def find_start(options: Options, storage: Storage) -> Start:
    """Find what the training starts from, and check that it fits the options and that something is left to train or to
    export. Reads only.

    Raises:
        UserError: it does not, or a checkpoint or the given weights cannot be used.
    """
    config, resume = options.config(), options.resume
    latest = storage.latest()
    if latest is None and resume in ("auto", "never"):
        return Start(None, False, Position(), None, init_weights(options))
    if latest is not None:
        if resume == "never":
            raise UserError(
                f"--resume never: {storage.location} already holds checkpoints; give another --name, or --resume auto"
                " to continue"
            )
        origin, state = storage.join(latest[0]), latest[1]
        if resume != "auto":
            say(f"--resume {resume} has no effect: continuing from {storage.location}")
    else:
        origin = _given_checkpoint(resume)
        state = load_checkpoint(origin)
    if options.init_from is not None:
        say(f"--init-from has no effect: continuing from {origin}")
    check_fits(config, state, origin)
    own = latest is not None
    if own and (changed := differences(texts(Config.from_dict(state["config"])), texts(config))):
        say(f"options that have changed since {origin}: {changed}")
    # Another run's best metric is reset, so that its patience does not count.
    position = position_in(state) if own else Position(state["nimg"])
    _check_remaining(config, position, storage.location if own else None, origin)
    return Start(origin, own, position, state["run_id"] if own else None, None)


def _given_checkpoint(resume: str) -> str:
    """The checkpoint at ``--resume PATH``: PATH itself, or the latest one of the run there."""
    given = open_storage(resume)
    if names := given.checkpoints():
        return given.join(names[-1])
    parent, _, name = given.location.rpartition("/")
    if name in open_storage(parent).checkpoints():
        return given.location
    raise UserError(f"--resume {resume}: neither auto nor never, nor a checkpoint or run folder")


def init_weights(options: Options) -> Path | None:
    """The path of ``--init-from``, after a trial that its weights fit."""
    if options.init_from is None:
        if frozen := options.optim.freeze_d:
            raise UserError(
                f"--optim.freeze-d {frozen} without --init-from: these layers of the discriminator would keep random"
                " weights; give the weights to start from, or --optim.freeze-d 0"
            )
        return None
    path = resolved_path(options.init_from)
    if not checkpoint.holds_weights(path):
        problem = "has no weights" if path.exists() else "does not exist"
        raise UserError(
            f"--init-from {options.init_from} {problem}: give a run's folder, a checkpoint or a .safetensors file"
        )
    transfer.init_from(GAN(options.config(), torch.device("cpu"), world_size=1), path)
    return path


def is_complete(config: Config, position: Position) -> bool:
    """Whether there is nothing left to train at ``position``."""
    return position.nimg >= config.kimg * 1000 or why_stopped(config, position) is not None


def _check_remaining(config: Config, position: Position, own: str | None, origin: str) -> None:
    """Check that there is something left to train or to export.

    Args:
        own: location of the run if ``origin`` is its own checkpoint.
    """
    reached = f"{position.nimg / 1000:g} kimg and --kimg {config.kimg:g}"
    if own is None and position.nimg >= config.kimg * 1000:
        raise UserError(f"--resume {origin}: at {reached} there is nothing left to train; give a larger --kimg")
    if own is not None and is_complete(config, position) and position.best is None:
        raise UserError(
            f"{own} has no evaluated generator, and at {reached} there is nothing left to train; a larger --kimg trains"
            " it further"
        )


def is_finished(config: Config, position: Position, storage: Storage) -> bool:
    """Whether the training is complete, with its generator exported and registered. Prints which option trains it
    further."""
    if not is_complete(config, position):
        return False
    if not tracking.is_finished(storage.work):
        say(f"{storage.location} has nothing left to train; its best generator is to be exported")
        return False
    reason = why_stopped(config, position)
    if position.nimg < config.kimg * 1000:
        say(f"{storage.location} is finished: {reason}; change that option to train it further")
    else:
        say(f"{storage.location} is finished; a larger --kimg trains it further")
    return True


@contextlib.contextmanager
def only_training(storage: Storage) -> Iterator[None]:
    """Hold the lock of a run in this process. It ends with the process, however that ends. Folders that are made for it
    are removed at the end if nothing else is in them. A run in a bucket is locked on this machine only.

    Raises:
        UserError: another process trains the run, or its folder cannot be written.
    """
    made = [folder for folder in (storage.work, *storage.work.parents) if not folder.exists()]
    lock = FileLock(storage.work / _LOCK)
    try:
        storage.work.mkdir(parents=True, exist_ok=True)
        lock.acquire(_LOCK_SECONDS)
    except Timeout:
        raise UserError(
            f"{storage.location} is being trained by another process; wait for it, stop it, or give another --name"
        ) from None
    except OSError as error:
        raise UserError(f"cannot create or lock {storage.work} ({error.strerror}); give another --out") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()  # processes that wait for it notice
            for folder in made:
                folder.rmdir()
        lock.release()
