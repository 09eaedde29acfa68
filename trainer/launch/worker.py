"""One worker of a training, and training in this process alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from catgan.command import UserError, say
from catgan.machine import shorten_tmpdir
from export.registry import register
from trainer.checkpoints.storage import open_storage
from trainer.config import Config
from trainer.data.open import open_data
from trainer.distributed.context import Context, LocalContext
from trainer.launch.display import progress_display
from trainer.launch.signals import stop_requests
from trainer.loop import Outcome, Run, train
from trainer.networks import set_up_device
from trainer.tracking.messages import brief
from trainer.tracking.progress import Progress, print_line
from trainer.tracking.recorder import NullRecorder, Recorder
from trainer.tracking.server import with_password
from trainer.tracking.tracker import Tracker


@dataclass(frozen=True)
class Job:
    """The description of a training for its workers: plain values, since it is sent to other machines."""

    config: dict[str, Any]
    data: str | None
    location: str
    """Path or URL of the run."""
    tracking_uri: str
    """Without a password, which workers read from their environment: see ``server.with_password``."""
    run_id: str
    resume_from: str | None
    init_from: str | None = None


_MEMORY_IS_FULL = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def run_in_process(job: Job) -> Outcome:
    """Train in this process, on a GPU if there is one.

    Raises:
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint.
    """
    context = LocalContext()
    with progress_display() as show, stop_requests(context.stop):
        return work(job, context, show)


def work(job: Job, context: Context, show: Callable[[Progress], object] = print_line) -> Outcome:
    """Train as the worker of rank ``context.rank``. Every worker calls this; rank 0 records the training and calls
    ``show`` at each tick.

    Raises:
        UserError: also if memory, of the GPU or of the machine, is not enough.
    """
    config = Config.from_dict(job.config)
    try:
        return _work(job, config, context, show)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY_IS_FULL):
            raise UserError(_advice_on_memory(config, context, error)) from error
        raise


def _advice_on_memory(config: Config, context: Context, error: Exception) -> str:
    where = "the GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else "this machine"
    parts = f"--accumulate {2 * config.accumulate}" + (" --loss.no-share-batch" if config.loss.share_batch else "")
    in_parts = "" if config.projected.weight else f"process it in parts ({parts}), or "  # it takes whole batches
    return (
        f"the memory of {where} is not enough for --batch {config.batch} on {context.world_size} worker(s)"
        f" ({brief(error)}): {in_parts}give a smaller --batch, more workers or a smaller recipe"
    )


def _work(job: Job, config: Config, context: Context, show: Callable[[Progress], object]) -> Outcome:
    shorten_tmpdir()  # readers use sockets
    set_up_device(config, context.device)
    manifest = open_data(job.data, config.model.size, config.loader, config.model.conditional)
    init_from = Path(job.init_from) if job.init_from else None
    run = Run(open_storage(job.location), job.run_id, job.resume_from, init_from)
    if context.rank:
        return train(config, manifest, context, run, NullRecorder())
    workers = f"{context.world_size} worker" + ("s" if context.world_size > 1 else "")
    threads = f"{torch.get_num_threads()} CPU thread(s) each" if context.device.type == "cpu" else context.device.type
    say(f"training {config.recipe} on {workers}, {threads}")
    if aside := run.storage.set_aside():  # the driver did this on its machine
        say(f"{job.location} was deleted since it was trained here; the files of that run: {aside}")
    run.storage.pull()
    uri = None if config.track.offline else with_password(job.tracking_uri)
    tracker = Tracker(run.storage.work, uri, register=register)
    try:
        outcome = train(config, manifest, context, run, Recorder(manifest, run.storage, tracker, job.run_id, show))
    except BaseException:
        tracker.close()
        try:
            run.storage.push()
        except OSError as error:  # which would hide why the training ended
            say(f"warning: {job.location} lacks the latest files ({error})")
        raise
    tracker.close()
    try:
        run.storage.push()
    except OSError as error:
        raise UserError(
            f"the training is done, but {job.location} lacks the latest files ({error}): repeat the same command"
        ) from error
    return outcome
