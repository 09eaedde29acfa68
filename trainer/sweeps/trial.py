"""A trial: an ordinary run, trained in an actor of Ray Tune, which it reports each distance to.

The training runs in a thread of the actor, or with several workers on Ray Train. Tune never stops it: the sweep's
``Control`` does, so that a stopped trial ends as every stopped training does, with a checkpoint, a report and a status
in MLflow.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import torch
from ray import tune

from catgan.command import UserError, say
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage, open_storage
from trainer.distributed.context import LocalContext, Request
from trainer.launch.driver import train_with
from trainer.launch.link import create_link
from trainer.launch.options import Options
from trainer.launch.ray import Share, run_on_ray
from trainer.launch.signals import Stopped
from trainer.launch.worker import Job, work
from trainer.loop import Outcome
from trainer.report.history import METRIC
from trainer.tracking.journal import Journal
from trainer.tracking.server import with_password

LOG = "log.txt"
"""What a trial prints, in its folder."""

_POLL_SECONDS = 0.5

StopReason = Literal["worse", "interrupted"]
"""worse: others are better. interrupted: the sweep is, and the trial will be continued."""


@dataclass(frozen=True)
class Task:
    """What the sweep sends to a trial."""

    name: str
    options: Options
    location: str
    uri: str
    """MLflow's, without a password."""
    sweep: Mapping[str, str]
    workers: int
    resources: Mapping[str, float]
    """CPU and GPU of each worker."""
    max_threads: int | None
    control: Any


def create_control() -> Any:
    """Create the actor, on this machine, through which the sweep's command stops trials. It exists as long as this
    process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Control:  # defined here, so that its process does not import this module, and with it PyTorch
        def __init__(self) -> None:
            self._reasons: dict[str, str] = {}
            self._reports: dict[str, list[dict[str, Any]]] = {}

        def stop(self, name: str, reason: str) -> None:
            """``name`` "": all trials."""
            self._reasons[name] = reason

        def stop_reason(self, name: str) -> str | None:
            return self._reasons.get("") or self._reasons.get(name)

        def report(self, name: str, metrics: dict[str, Any]) -> None:
            self._reports.setdefault(name, []).append(metrics)

        def take(self, name: str) -> list[dict[str, Any]]:
            return self._reports.pop(name, [])

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Control).options(num_cpus=0, scheduling_strategy=here).remote()


class TrialActor(tune.Trainable):
    """One trial at a time; Tune uses it again for the next one, which saves loading PyTorch."""

    def setup(self, config: dict[str, Any]) -> None:
        self._task: Task = config["task"]
        self._training: _Training | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train until the next distance, or to the end. Returns ``kimg``, ``distance`` and others, or with ``done``
        ``status`` and ``message``."""
        if self._training is None:
            self._training = _Training(self._task)
        return self._training.next()


class _Training:
    """The training in a thread. It waits at each report until the sweep has decided whether it goes on."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.storage = open_storage(task.location)
        self._results: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._decided = threading.Semaphore(0)
        self._is_first = True
        self.last: dict[str, Any] = {}
        threading.Thread(target=self._main, daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next report or the end. Raises what the training has raised, for Tune, which starts the trial again."""
        if not self._is_first:
            self._decided.release()
        self._is_first = False
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def put(self, metrics: Mapping[str, Any], is_known: bool = False) -> None:
        """Report a distance, and wait for the decision. Other reports are dropped."""
        if metrics.get("metric") is None:
            return
        metric = metrics["metric"]
        self.last = {
            "kimg": metrics["kimg"],
            "distance": metric["value"],
            "error": metric.get("standard_error"),
            "name": metric["name"],
        }
        self._results.put(self.last | {"is_known": is_known})
        self._decided.acquire()

    @property
    def stop_reason(self) -> StopReason | None:
        reason: StopReason | None = ray.get(self.task.control.stop_reason.remote(self.task.name))
        return reason

    def _main(self) -> None:
        with _log_in(self.storage):
            try:
                end = {"status": self._train(), "message": ""}
            except UserError as error:
                end = {"status": "failed", "message": " ".join(str(error).split())}
                say(f"this trial has failed: {end['message']}")
            except BaseException as error:  # noqa: BLE001  # of any type: raised by next()
                say(f"this trial has crashed: {type(error).__name__}: {error}")
                self._results.put(error)
                return
        self._results.put(self.last | end | {"done": True})

    def _train(self) -> str:
        """Returns done, stopped, or left for a trial that will be continued."""
        try:
            for metrics in _history(self.storage):
                self.put(metrics, is_known=True)
            if self.stop_reason == "interrupted":
                return "left"
            train_with(self.task.options, self.storage, with_password(self.task.uri), self._execute, self.task.sweep)
        except Stopped:
            return "left" if self.stop_reason == "interrupted" else "stopped"
        return "done"

    def _execute(self, job: Job) -> Outcome:
        outcome = self._on_ray(job) if self.task.workers > 1 else self._here(job)
        if outcome.status == "stopped":
            raise Stopped(0)
        return outcome

    def _here(self, job: Job) -> Outcome:
        if not torch.cuda.is_available():
            threads = max(int(self.task.resources["CPU"]) - self.task.options.loader.workers, 1)
            torch.set_num_threads(min(threads, self.task.max_threads or threads))
        return work(job, _Context(self))

    def _on_ray(self, job: Job) -> Outcome:
        """With Ray Train. Its reports come through the actor, and the stop request is passed on."""
        task = self.task
        link = create_link()
        report = partial(_send, task.control, task.name)
        outcomes: queue.Queue[Outcome | BaseException] = queue.Queue()

        def fit() -> None:
            try:
                outcomes.put(run_on_ray(job, task.workers, Share(task.resources, link, report)))
            except BaseException as error:  # noqa: BLE001  # raised below
                outcomes.put(error)

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while True:
            is_over = not thread.is_alive()
            for metrics in ray.get(task.control.take.remote(task.name)):
                self.put(metrics)
            if self.stop_reason is not None:
                ray.get(link.request_stop.remote())
            if is_over:
                break
            time.sleep(_POLL_SECONDS)
        outcome = outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class _Context(LocalContext):
    """This process as the only worker of a trial."""

    def __init__(self, training: _Training) -> None:
        super().__init__()
        self._training = training

    def request(self) -> Request | None:
        return "stop" if self._training.stop_reason else None

    def report(self, metrics: dict[str, Any]) -> None:
        self._training.put(metrics)


def _send(control: Any, name: str, metrics: dict[str, Any]) -> None:
    ray.get(control.report.remote(name, metrics))


def _history(storage: Storage) -> Iterator[dict[str, Any]]:
    """The distances up to the latest checkpoint, for a sweep that has not heard of them, as reports."""
    names = storage.checkpoints()
    if not names:
        return
    with contextlib.suppress(OSError):
        storage.pull()
    for row in Journal(storage.work / "metrics.jsonl").records():
        if row["nimg"] <= checkpoint.position(names[-1]):
            for name, value in row.items():
                if METRIC.fullmatch(name) and value is not None:
                    yield {"kimg": row["kimg"], "metric": {"name": name, "value": value}}


@contextlib.contextmanager
def _log_in(storage: Storage) -> Iterator[None]:
    """Let this process write its messages to the run's folder, in which they are looked for. If that is impossible they
    stay in Ray's log files."""
    try:
        storage.work.mkdir(parents=True, exist_ok=True)
        file = (storage.work / LOG).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError:
        yield
        return
    with file, contextlib.redirect_stderr(file):
        yield
