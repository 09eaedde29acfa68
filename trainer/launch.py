"""Starting the loop: in this process, or in the workers of Ray Train."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infer.command import say
from trainer import checkpoint
from trainer.config import Config
from trainer.context import Context, LocalContext, RayContext
from trainer.data.drawn import open_data
from trainer.loop import train
from trainer.recorder import Recorder
from trainer.tracking import Tracker

MAX_FAILURES = 3


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, since it travels to other machines."""

    config: dict[str, Any]
    data: str | None
    run_dir: str
    tracking_uri: str
    run_id: str
    resume_from: str | None


def run_in_process(job: Job) -> None:
    resume_from = Path(job.resume_from) if job.resume_from else None
    _work(job, LocalContext(Path(job.run_dir), resume_from))


def run_on_ray(job: Job, workers: int | tuple[int, int]) -> None:
    """Train with Ray Train V2 on the cluster at RAY_ADDRESS, on one that runs here, or on a new one on this machine.

    A run is an experiment of Ray Train of the same name and storage, so its checkpoints lie where an in-process run
    puts them, and each kind continues what the other began.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than ``MAX_FAILURES``.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    run_dir = Path(job.run_dir)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=None if gpu else {"CPU": _cpus_per_worker(workers)}
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoint.NUM_TO_KEEP),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
    )
    trainer.fit()


def cluster_gpus() -> int:
    """GPUs at hand: of the Ray cluster this process is connected to or would connect to, else of this machine."""
    import ray

    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()


def _cpus_per_worker(workers: int | tuple[int, int]) -> int:
    """CPUs for each worker such that the most workers asked for fit on the cluster, at least one."""
    import ray

    most = workers if isinstance(workers, int) else workers[1]
    return max(int(ray.cluster_resources().get("CPU", 1)) // most, 1)


def _ray_worker(values: dict[str, Any]) -> None:
    import ray

    job = Job(**values)
    if not torch.cuda.is_available():
        torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    _work(job, RayContext(Path(job.resume_from) if job.resume_from else None))


def _work(job: Job, context: Context) -> None:
    config = Config.from_dict(job.config)
    manifest = open_data(job.data, config.model.size)
    if context.rank:
        train(config, manifest, context, None)
        return
    say(f"training on {context.device} with {context.world_size} worker(s)")
    run_dir = Path(job.run_dir)
    tracker = Tracker(run_dir, job.tracking_uri, job.run_id)
    try:
        train(config, manifest, context, Recorder(manifest, run_dir, tracker, job.run_id))
    finally:
        tracker.flush()
