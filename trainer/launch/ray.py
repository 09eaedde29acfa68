"""Training with Ray Train: starting workers, retrying after lost workers, stopping."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from catgan.command import UserError, say
from trainer.checkpoints.storage import Bucket, Storage, open_storage
from trainer.distributed.context import RayContext
from trainer.launch.connect import Workers, cluster_address, resource_unit
from trainer.launch.display import progress_display
from trainer.launch.link import create_link, listening, telling
from trainer.launch.signals import stop_requests
from trainer.launch.worker import Job, work
from trainer.loop import Outcome
from trainer.tracking.messages import brief
from trainer.tracking.progress import print_line

MAX_FAILURES = 4
"""Give up after this many worker failures without a new checkpoint."""

_RESIZE_SECONDS = 30.0  # interval of the checks whether an elastic training can grow


@dataclass(frozen=True)
class Share:
    """What a trial of a sweep uses of a cluster that it shares with others, and how it is stopped and watched."""

    resources: Mapping[str, float]
    """CPU and GPU of each worker."""
    link: Any
    """The actor of ``create_link``."""
    report: Callable[[dict[str, Any]], object]
    """Gets what the training reports, in a process of Ray Train."""


def run_on_ray(job: Job, workers: Workers, share: Share | None = None) -> Outcome:
    """Train with Ray Train V2. When workers or nodes are lost, restart from the latest checkpoint, see
    ``MAX_FAILURES``; announced preemptions are not counted as failures.

    The training saves its checkpoints itself, in the same format and place as in one process, so that either can
    continue the other. Ray Train keeps only its own state next to them.

    Call ``connect_ray`` first.

    Args:
        share: of a trial, which is stopped by its link alone; default: all of the cluster, stopped by signals.

    Raises:
        UserError: a worker raised a ``UserError``, or there were too many failures.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint.
        KeyboardInterrupt: after a second Ctrl-C.
    """
    import ray

    storage = open_storage(job.location)
    if share is not None:
        trainer = _ray_trainer(job, workers, share.resources, storage, share.link, share.report)
        with listening(share.link, print_line):
            return Outcome(**_fit_with_retries(trainer.fit, storage).return_value)
    link = create_link()
    trainer = _ray_trainer(job, workers, _resources(workers), storage, link)
    try:
        with progress_display() as show, listening(link, show), stop_requests(link.request_stop.remote):
            return Outcome(**_fit_with_retries(trainer.fit, storage).return_value)
    except KeyboardInterrupt:
        ray.shutdown()  # the workers would train on until this process has recorded the end
        raise


def _resources(workers: Workers) -> dict[str, float]:
    """CPU and GPU of each worker of a training that has the cluster for itself."""
    if resource_unit() == "GPU":
        return {"GPU": 1}
    return {"CPU": _cpus_per_worker(workers if isinstance(workers, int) else workers[1])}


def _ray_trainer(
    job: Job,
    workers: Workers,
    resources: Mapping[str, float],
    storage: Storage,
    link: Any,
    report: Callable[[dict[str, Any]], object] | None = None,
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train's own handler of Ctrl-C would replace that of ``stop_requests`` and lose the progress."""

    class Watch(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            assert report is not None
            report(metrics[0])

    use_gpu = resources.get("GPU", 0) > 0
    return Trainer(
        _ray_worker,  # type: ignore[arg-type]  # the stubs lack its return value
        train_loop_config={"job": asdict(job), "link": link, "max_threads": _max_threads()},
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the stubs are those of Ray Train V1
            use_gpu=use_gpu,
            resources_per_worker=None if dict(resources) == {"GPU": 1} else dict(resources),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            **_ray_storage(storage),
            failure_config=FailureConfig(max_failures=0),  # _fit_with_retries handles failures
            # It also reports them. Ray's own messages, with its actors' tracebacks, are in the session's log files.
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
            callbacks=[Watch()] if report else None,  # type: ignore[list-item]  # the stubs are those of V1
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )


def _fit_with_retries(fit: Callable[[], Any], storage: Storage) -> Any:
    """Call ``fit`` again after worker failures. Give up after ``MAX_FAILURES`` of them without a new checkpoint.

    Raises:
        UserError: gave up, or a worker raised it.
    """
    from ray.train import TrainingFailedError

    failures, latest = 0, storage.checkpoints()[-1:]
    while True:
        try:
            return fit()
        except TrainingFailedError as error:
            lost: dict[int, Exception] = getattr(error, "worker_failures", {})  # missing if Ray's controller failed
            for failure in lost.values():
                if isinstance(failure, UserError):
                    raise failure from None
            before, latest = latest, storage.checkpoints()[-1:]
            failures = failures + 1 if latest == before else 1
            name = "worker " + ", ".join(map(str, sorted(lost))) if lost else "Ray Train's controller"
            reasons = "; ".join(sorted({brief(failure) for failure in lost.values()} or {brief(error)}))
            if failures == MAX_FAILURES:
                raise UserError(
                    f"workers were lost {failures} times without a new checkpoint, the last time {name} ({reasons});"
                    " the same command continues from the last checkpoint, --debug shows the traceback"
                ) from error
            say(f"warning: lost {name} ({reasons}); continuing from the last checkpoint")


def _ray_storage(storage: Storage) -> dict[str, Any]:
    """Arguments of ``RunConfig`` that keep Ray Train's state of a run in the run's folder."""
    if not isinstance(storage, Bucket):
        return {"name": storage.name, "storage_path": str(storage.work.parent)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    folder = storage.path.rpartition("/")[0]
    files = PyFileSystem(FSSpecHandler(storage.filesystem))
    return {"name": storage.name, "storage_path": folder, "storage_filesystem": files}


def _cpus_per_worker(workers: int) -> int:
    """The largest number of CPUs per worker with which all workers fit on the cluster's nodes, at least one. A worker
    with more CPUs than any node has would never be scheduled."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = (c for c in range(max(nodes), 0, -1) if sum(n // c for n in nodes) >= workers)
    return next(fitting, 1)


def _max_threads() -> int | None:
    """The number of threads that the user sets for this machine, if any. Where Ray has started this process as a job,
    the variable is Ray's."""
    is_chosen = "OMP_NUM_THREADS" in os.environ and cluster_address() is None
    return torch.get_num_threads() if is_chosen else None


def _ray_worker(values: dict[str, Any]) -> dict[str, Any]:
    """Train as one worker of Ray Train, in a thread of its process. Returns the fields of the ``Outcome``."""
    import ray

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs each report through the root logger
    if not torch.cuda.is_available():
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        torch.set_num_threads(min(cpus, values["max_threads"] or cpus))
    context = RayContext(values["link"])
    with telling(values["link"], context.rank) as show:
        return asdict(work(Job(**values["job"]), context, show))
