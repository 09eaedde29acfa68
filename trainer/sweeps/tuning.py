"""Trials on Ray Tune: which comes next, which is stopped, what is remembered of each."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from catgan.command import UserError, say
from trainer.launch.signals import stop_requests
from trainer.sweeps.resources import Need
from trainer.sweeps.state import Ledger, Point, Rungs, Status, Trial
from trainer.sweeps.trial import Task, TrialActor
from trainer.tracking.messages import brief

MAX_CRASHES = 3
"""How often a trial is started again after its process or node was lost."""

_LENGTH = 200  # of a reason

# Nothing of Tune's own is kept or printed: the sweep's journal and the runs have it all.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class _NotKept:
    """Tune pickles what it is given, to continue from that. A sweep continues from its journal instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Scheduler(_NotKept, ASHAScheduler):
    """Ray's ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning", 2020). It stops no trial itself,
    but asks ``stop`` to. Distances that were known before are entered without a decision, which was made when they were
    new.

    ASHA gets one distance of each trial at each rung, as if it had been measured exactly there: the first one that is
    at most half a snapshot below the rung, see ``Rungs.reached``.
    """

    def __init__(self, rungs: Rungs, stop: Callable[[str], None], snapshot_kimg: Callable[[str], float]) -> None:
        """
        Args:
            stop: stops the trial of this name.
            snapshot_kimg: kimg between two snapshots of the trial of this name.
        """
        super().__init__(
            time_attr="kimg",
            metric="distance",
            mode="min",
            max_t=rungs.last,  # type: ignore[arg-type]  # kimg need not be whole
            grace_period=rungs.first,  # type: ignore[arg-type]
            reduction_factor=rungs.reduction,
        )
        self._rungs, self._stop, self._snapshot_kimg = rungs, stop, snapshot_kimg
        self._entered: dict[str, float] = {}  # the last rung of each trial

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "distance" not in result:
            return TrialScheduler.CONTINUE
        name = _name(trial)
        rung = self._rungs.reached(result["kimg"], self._snapshot_kimg(name))
        if rung is not None and rung > self._entered.get(name, 0.0):
            self._entered[name] = rung
            action = super().on_trial_result(tune_controller, trial, result | {"kimg": rung})
            if action == TrialScheduler.STOP and not result.get("is_known"):
                self._stop(name)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: the result repeats the last distance."""

    def remember(self, trial: Trial) -> None:
        """Enter the distances of a trial that was over before this process began."""
        known = _Known(trial.name)
        self.on_trial_add(None, known)  # type: ignore[arg-type]
        for kimg, point in sorted(trial.points.items()):
            result = {"kimg": kimg, "distance": point.value, "is_known": True}
            self.on_trial_result(None, known, result)


class _Known:
    """A trial as ASHA sees it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


def _name(trial: Any) -> str:
    if isinstance(trial, _Known):
        return trial.trial_id
    return str(trial.config["task"].name)


class _Queue(_NotKept, Searcher):
    """Hands the trials of a sweep to Tune."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        super().__init__(metric="distance", mode="min")
        self._tasks = tasks

    def suggest(self, trial_id: str) -> Any:
        task = next(self._tasks, None)
        return Searcher.FINISHED if task is None else {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The sweep hears of it from ``_Watch``."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's journal has it."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _Watch(_NotKept, tune.Callback):
    """Writes what happens into the ledger."""

    def __init__(self, ledger: Ledger, changed: Callable[[Trial | None], None]) -> None:
        self._ledger, self._changed = ledger, changed

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._ledger.trials[_name(trial)]
        own.status, own.started, own.started_at = "running", time.monotonic(), own.kimg
        self._changed(own)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        own = self._ledger.trials[_name(trial)]
        if "distance" in result and math.isfinite(result["distance"]):
            point = Point(result["kimg"], result["distance"], result["error"])
            self._ledger.measured(own.name, result["name"], point)
            if result.get("is_known"):
                own.started, own.started_at = time.monotonic(), own.kimg
        if "status" in result:
            self._end(own, result["status"], result["message"])
        self._changed(None if "status" not in result else own)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._ledger.trials[_name(trial)]
        reason = _reason(trial)
        say(f"{own.name}: its process was lost{reason and f' ({reason})'}; continuing from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._ledger.trials[_name(trial)]
        self._end(
            own, "failed", f"lost {MAX_CRASHES + 1} times, the last time: {_reason(trial) or 'for no known reason'}"
        )
        self._changed(own)

    def _end(self, trial: Trial, status: str, message: str) -> None:
        if status == "left":
            trial.status = "waiting"
            return
        ended: Status = "done" if status == "done" else "stopped" if status == "stopped" else "failed"
        self._ledger.ended(trial.name, ended, message)
        if ended == "failed":
            say(f"{trial.name} has failed: {message}")


def _reason(trial: Any) -> str:
    """Why the process of a trial was lost, in one line; empty if Ray does not say."""
    error = trial.get_pickled_error() or trial.get_error()
    if isinstance(error, BaseException):
        # A task's error has the trainable's as its cause; that of a lost process explains itself in a paragraph.
        error = getattr(error, "cause", None) or error
    lines = str(error or "").strip().splitlines()
    return " ".join(lines[0].split())[:_LENGTH] if lines else ""


def run_trials(
    tasks: Iterator[Task],
    ledger: Ledger,
    need: Need,
    at_once: int,
    rungs: Rungs | None,
    snapshot_kimg: Callable[[str], float],
    control: Any,
    changed: Callable[[Trial | None], None],
) -> None:
    """Train trials on Ray Tune, at most ``at_once`` at a time, until there are no more.

    Args:
        tasks: trials in their order; asked for one as soon as there is room.
        rungs: where to stop those that are worse; None: train all to the end.
        snapshot_kimg: see ``Scheduler``.
        control: of ``trial.create_control``.
        changed: called whenever the ledger has news; with a trial that begins or ends.

    Raises:
        Stopped: after Ctrl-C or SIGTERM. Trials that were running have a checkpoint.
        UserError: Tune itself has failed.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def stop_worse(name: str) -> None:
        ray.get(control.stop.remote(name, "worse"))

    scheduler: TrialScheduler = FIFOScheduler()
    if rungs is not None:
        scheduler = asha = Scheduler(rungs, stop_worse, snapshot_kimg)
        for trial in ledger.trials.values():
            if trial.is_over and trial.of is None:
                asha.remember(trial)
    stopping: list[bool] = []

    def until_stopped() -> Iterator[Task]:
        for task in tasks:
            yield task
            if stopping:
                return

    def stop() -> None:
        stopping.append(True)
        control.stop.remote("", "interrupted")

    with tempfile.TemporaryDirectory() as scratch, stop_requests(stop):
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, need.request()),
            tune_config=tune.TuneConfig(
                search_alg=_Queue(until_stopped()),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_CRASHES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials have their own
                callbacks=[_Watch(ledger, changed)],
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            raise UserError(f"Ray Tune has failed ({brief(error)}); the same command continues the sweep") from error
