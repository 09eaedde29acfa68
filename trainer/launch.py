"""Starting the loop: in this process, or in the workers of Ray Train."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infer.command import UserError, say
from trainer import checkpoint
from trainer.config import Config
from trainer.context import Context, LocalContext, RayContext
from trainer.data.drawn import open_data
from trainer.loop import Diverged, train
from trainer.recorder import Recorder
from trainer.tracking import Tracker

Workers = int | tuple[int, int]

MAX_FAILURES = 3

# Ray's and Ray Train's chatter: deduplicated lines, colours, a second copy of each print, counters nobody reads here.
# The short interval is how often a report is collected: at the default of two seconds each snapshot would wait for it.
_QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
}


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, since it travels to other machines."""

    config: dict[str, Any]
    data: str | None
    run_dir: str
    tracking_uri: str
    run_id: str
    resume_from: str | None
    init_from: str | None = None


def run_in_process(job: Job) -> None:
    """Train here, on the GPU if there is one."""
    resume_from = Path(job.resume_from) if job.resume_from else None
    _work(job, LocalContext(Path(job.run_dir), resume_from))


def connect_ray(most_workers: int) -> None:
    """Connect to the cluster at RAY_ADDRESS (a submitted job has it), or start one on this machine that ends with
    this process."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.ERROR)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody preempts this machine
    ray.init(
        num_cpus=max(os.cpu_count() or 1, most_workers),
        object_store_memory=200 << 20,  # nothing large goes through it; the default is a third of the memory
        include_dashboard=True,  # on loopback; without it Ray Train complains every second that it is missing
        logging_level=logging.ERROR,
    )


def cluster_gpus() -> int:
    """GPUs to train on: of the Ray cluster this process is in or would join, else of this machine."""
    if "RAY_ADDRESS" in os.environ:
        connect_ray(1)
        import ray

        return int(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()


def run_on_ray(job: Job, workers: Workers) -> None:
    """Train with Ray Train V2.

    A run is an experiment of Ray Train of the same name and storage, so its checkpoints lie where an in-process run
    puts them, and each kind continues what the other began.

    Raises:
        UserError: the cluster is too small, or a worker met a mistake of the user's.
        Diverged: a loss was not finite.
        KeyboardInterrupt: stopped by Ctrl-C.
        ray.train.TrainingFailedError: the workers failed more often than ``MAX_FAILURES``.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    connect_ray(most)
    import ray
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    unit = "GPU" if resources.get("GPU", 0) else "CPU"
    available = int(resources.get(unit, 0))
    if available < least:  # Ray Train would wait for them without a word
        raise UserError(f"--workers {least}: the Ray cluster has {available} {unit}s; ask for fewer or add nodes")
    run_dir = Path(job.run_dir)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the stubs are those of Ray Train V1
            use_gpu=unit == "GPU",
            resources_per_worker={"CPU": _cpus_per_worker(most)} if unit == "CPU" else None,
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoint.NUM_TO_KEEP),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(backend="nccl" if unit == "GPU" else "gloo"),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        # fit() has a handler for Ctrl-C of its own, which ends with this.
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, UserError | Diverged):
                raise failure from None
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def _cpus_per_worker(workers: int) -> int:
    """The most CPUs a worker can have such that so many workers fit on the cluster's nodes, at least one. Asking for
    more than a node has would wait for ever."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (c for c in range(max(nodes), 0, -1) if sum(n // c for n in nodes) >= workers)
    return next(fitting, 1)


def _ray_worker(values: dict[str, Any]) -> None:
    """One worker of Ray Train; runs in a thread of the worker's process."""
    import ray

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs each report through the root logger
    job = Job(**values)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    _work(job, RayContext(Path(job.resume_from) if job.resume_from else None))


def _work(job: Job, context: Context) -> None:
    config = Config.from_dict(job.config)
    manifest = open_data(job.data, config.model.size, config.loader)
    init_from = Path(job.init_from) if job.init_from else None
    if context.rank:
        train(config, manifest, context, job.run_id, None, init_from)
        return
    workers = f"{context.world_size} worker" + ("s" if context.world_size > 1 else "")
    threads = f"{torch.get_num_threads()} CPU thread(s) each" if context.device.type == "cpu" else context.device.type
    say(f"training {config.recipe} on {workers}, {threads}")
    run_dir = Path(job.run_dir)
    tracker = Tracker(run_dir, None if config.track.offline else job.tracking_uri)
    try:
        train(config, manifest, context, job.run_id, Recorder(manifest, run_dir, tracker, job.run_id), init_from)
    finally:
        tracker.close()
