"""Starting the loop: in this process, or in the workers of Ray Train."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from catgan.command import UserError, say
from catgan.machine import cores
from trainer.checkpoints.storage import Bucket, Storage, open_storage
from trainer.config import Config
from trainer.data.open import open_data
from trainer.distributed.context import Context, LocalContext, RayContext
from trainer.loop import Outcome, Run, train
from trainer.tracking.outbox import brief
from trainer.tracking.recorder import Recorder
from trainer.tracking.server import with_password
from trainer.tracking.tracker import Tracker

Workers = int | tuple[int, int]

MAX_FAILURES = 4
"""Losses of workers since the last new checkpoint, the last one of which ends a training."""

_RESIZE_SECONDS = 30.0  # between looks at whether an elastic training can grow

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h

# Ray's and Ray Train's chatter: deduplicated lines, colours, a second copy of each print, counters nobody reads here.
# The interval is how often a report is collected, which a snapshot waits for (Ray's default: two seconds); each look
# wakes several processes, which takes from workers that have no core to spare.
_QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, since it travels to other machines."""

    config: dict[str, Any]
    data: str | None
    location: str
    """Of the run, a path or URL."""
    tracking_uri: str
    """Without a password, which the workers have from their environment: see ``server.with_password``."""
    run_id: str
    resume_from: str | None
    init_from: str | None = None


def run_in_process(job: Job) -> Outcome:
    """Train here, on the GPU if there is one; SIGTERM ends it at the next tick, with a checkpoint."""
    context = LocalContext()
    with _on_sigterm(context.stop):
        return work(job, context)


@contextmanager
def _on_sigterm(stop: Callable[[], object]) -> Iterator[None]:
    """The end of a job or machine is announced by SIGTERM; a second one ends this process at once."""

    def handle(number: int, frame: object) -> None:
        say("SIGTERM: saving a checkpoint at the next tick, then ending")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Ray Train's actors ask the dashboard, and would look for it among all of this machine's clusters: beside another
    # training they find two and fail.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    ray.init(
        dashboard_port=port,
        num_cpus=max(cores(), most_workers),
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


def run_on_ray(job: Job, workers: Workers) -> Outcome:
    """Train with Ray Train V2: restarted from the newest checkpoint when workers or nodes are lost, until that has
    happened ``MAX_FAILURES`` times without a new checkpoint. Announced preemptions do not count.

    Checkpoints are kept by the training itself, so those of every kind of run lie in the same place, and each kind
    continues what the other began. Ray Train keeps its own notes beside them.

    Raises:
        UserError: the cluster is too small, a worker met a mistake of the user's, or the workers fail again and again.
        KeyboardInterrupt: stopped by Ctrl-C.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    connect_ray(most)
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    unit = "GPU" if resources.get("GPU", 0) else "CPU"
    available = int(resources.get(unit, 0))
    if available < least:  # Ray Train would wait for them without a word
        raise UserError(f"--workers {least}: the Ray cluster has {available} {unit}s; ask for fewer or add nodes")
    storage = open_storage(job.location)
    bell = _hang_bell()
    trainer = TorchTrainer(
        _ray_worker,  # type: ignore[arg-type]  # whose result is wanted, the stubs do not know of it
        train_loop_config={"job": asdict(job), "bell": bell},
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the stubs are those of Ray Train V1
            use_gpu=unit == "GPU",
            resources_per_worker={"CPU": _cpus_per_worker(most)} if unit == "CPU" else None,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            **_ray_storage(storage),
            failure_config=FailureConfig(max_failures=0),  # what becomes of one is decided here
            # And said here; Ray's own words about it, with tracebacks of its actors, are in the session's log files.
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        ),
        torch_config=TorchConfig(backend="nccl" if unit == "GPU" else "gloo"),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _on_sigterm(bell.ring.remote):
            return Outcome(**_insist(trainer.fit, storage).return_value)
    except SystemExit:
        # fit() has a handler for Ctrl-C of its own, which ends with this.
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def _insist(fit: Callable[[], Any], storage: Storage) -> Any:
    """Train until ``fit`` returns, in spite of lost workers, see ``run_on_ray``."""
    from ray.train import TrainingFailedError

    failures, newest = 0, storage.checkpoints()[-1:]
    while True:
        try:
            return fit()
        except TrainingFailedError as error:
            lost: dict[int, Exception] = getattr(error, "worker_failures", {})  # else Ray's controller failed
            for failure in lost.values():
                if isinstance(failure, UserError):
                    raise failure from None
            before, newest = newest, storage.checkpoints()[-1:]
            failures = failures + 1 if newest == before else 1
            who = "worker " + ", ".join(map(str, sorted(lost))) if lost else "Ray Train's controller"
            reasons = "; ".join(sorted({brief(failure) for failure in lost.values()} or {brief(error)}))
            if failures == MAX_FAILURES:
                raise UserError(
                    f"workers were lost {failures} times without a new checkpoint, at last {who} ({reasons}); the same"
                    " command continues from the last checkpoint, and --debug shows where it was"
                ) from error
            say(f"warning: lost {who} ({reasons}); going on from the last checkpoint")


def _ray_storage(storage: Storage) -> dict[str, Any]:
    """Where Ray Train keeps its notes of a run: in the run's folder."""
    if not isinstance(storage, Bucket):
        return {"name": storage.name, "storage_path": str(storage.work.parent)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    folder = storage.path.rpartition("/")[0]
    files = PyFileSystem(FSSpecHandler(storage.place))
    return {"name": storage.name, "storage_path": folder, "storage_filesystem": files}


def _hang_bell() -> Any:
    """An actor on this machine that remembers whether training is to end; it lives as long as this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Bell:  # in here, so that its process need not import this module, and with it PyTorch
        def __init__(self) -> None:
            self.rung = False

        def ring(self) -> None:
            self.rung = True

        def is_rung(self) -> bool:
            return self.rung

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Bell).options(num_cpus=0, scheduling_strategy=here).remote()


def _cpus_per_worker(workers: int) -> int:
    """The most CPUs a worker can have such that so many workers fit on the cluster's nodes, at least one. Asking for
    more than a node has would wait for ever."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (c for c in range(max(nodes), 0, -1) if sum(n // c for n in nodes) >= workers)
    return next(fitting, 1)


def _ray_worker(values: dict[str, Any]) -> dict[str, Any]:
    """One worker of Ray Train; runs in a thread of the worker's process."""
    import ray

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs each report through the root logger
    if not torch.cuda.is_available():
        torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    return asdict(work(Job(**values["job"]), RayContext(values["bell"])))


def keep_freed_memory() -> None:
    """Let this process keep what a step frees for the next one: the C library would give large blocks back to the
    system, and each page of theirs would cost a fault again. Without glibc nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most there can be
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_TOP_PAD, 64 << 20)  # what a thread's heap, of 64 MiB each, keeps: all of it


def work(job: Job, context: Context) -> Outcome:
    """Train as one of the workers; each calls this with a context of its own, and rank 0 keeps the records."""
    if context.device.type == "cpu":
        keep_freed_memory()
    config = Config.from_dict(job.config)
    manifest = open_data(job.data, config.model.size, config.loader)
    init_from = Path(job.init_from) if job.init_from else None
    run = Run(open_storage(job.location), job.run_id, job.resume_from, init_from)
    if context.rank:
        return train(config, manifest, context, run, None)
    workers = f"{context.world_size} worker" + ("s" if context.world_size > 1 else "")
    threads = f"{torch.get_num_threads()} CPU thread(s) each" if context.device.type == "cpu" else context.device.type
    say(f"training {config.recipe} on {workers}, {threads}")
    run.storage.pull()
    tracker = Tracker(run.storage.work, None if config.track.offline else with_password(job.tracking_uri))
    try:
        return train(config, manifest, context, run, Recorder(manifest, run.storage, tracker, job.run_id))
    finally:
        tracker.close()
        run.storage.push()
