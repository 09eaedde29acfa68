"""The driver of ``trainer/sweep.py``: plan the trials, train them, repeat the best, say which is best and how sure."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import torch

from catgan.command import UserError, say
from catgan.dataset import Manifest
from catgan.location import join
from catgan.machine import cores
from trainer.checkpoints.storage import open_storage
from trainer.data.open import open_data
from trainer.launch.connect import cluster_address, connect_ray
from trainer.launch.driver import default_out, folder_beside, num_gpus, with_environment
from trainer.launch.machine import check_machine
from trainer.launch.options import value_of
from trainer.launch.signals import Stopped
from trainer.launch.start import only_training
from trainer.recipes import resolve
from trainer.sweeps import page
from trainer.sweeps.options import parse_sweep
from trainer.sweeps.plan import Plan, make_plan, positions, settings, snapshot_kimg
from trainer.sweeps.resources import Need, Node, decide_need, num_at_once
from trainer.sweeps.sampler import Tree
from trainer.sweeps.space import corners
from trainer.sweeps.state import Ledger, Rungs, Trial
from trainer.sweeps.table import Table
from trainer.sweeps.verdict import Verdict, decide, rank
from trainer.tracking import server
from trainer.tracking.messages import brief, redact
from trainer.tracking.sweeps import log_sweep

_LONGER = 4
"""The best configuration is to be trained so many times as long as a trial, or as its recipe says if that is longer."""


def main(argv: list[str]) -> dict[str, Any]:
    """Run a sweep, or with ``--dry-run`` print its plan. Returns the JSON object for stdout."""
    sweep = parse_sweep(argv)
    words = list(sweep.words)
    data = value_of(words, "--data")
    manifest = Manifest.load(data) if data else None
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # an actor that is no longer needed would be an error
    if cluster_address() is not None and not sweep.dry_run:
        connect_ray(0, show_logs=False)
    gpus = num_gpus([*words, "--dry-run"] if sweep.dry_run else words)
    recipe = with_environment(resolve(sweep.recipe, manifest.size if manifest else None, gpus > 0))
    plan = make_plan(sweep, recipe, manifest)
    tail = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    storage = open_storage(join(sweep.out or default_out(), sweep.name or f"sweep-{plan.base.recipe}-{tail}"))
    uri = server.resolve_uri(plan.base.track.uri, folder_beside(storage))
    check_machine(replace(plan.base, dry_run=sweep.dry_run), storage, elsewhere=cluster_address() is not None)
    ledger = Ledger(storage, settings(plan))
    if sweep.dry_run:
        return _dry_run(plan, ledger)
    # Ray prints messages of nodes to stdout, which is for the JSON object.
    with only_training(storage), contextlib.redirect_stdout(sys.stderr):
        ledger = Ledger(storage, settings(plan))  # from here on nobody else changes it
        connect_ray(1, show_logs=False)
        return _Sweep(plan, ledger, uri).run()


def _dry_run(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """Print the plan of the sweep. Returns the JSON object for stdout."""
    need, at_once = _resources(plan, [Node(cores(), torch.cuda.device_count())])
    listed, best = plan.listed(), plan.sweep.confirm
    say(f"would try {' '.join(map(str, plan.dimensions))}: {plan.num_trials} trials ({plan.sweep.algorithm})")
    if listed is None:
        say(f"values depend on earlier trials; the first ones are random, drawn with --seed {plan.base.seed}")
    for i, chosen in enumerate(listed or []):
        say(f"  {_trial_name(i)}  " + "  ".join(f"{field}={value}" for field, value in chosen.items()))
    if plan.sweep.algorithm == "random":
        say(f"drawn with --seed {plan.base.seed}, which draws the same ones again")
    say(f"each with {need}, {at_once} at a time on this machine, {plan.base.kimg:g} kimg, in {ledger.storage.location}")
    if plan.rungs:
        say(f"the worse ones are stopped at {', '.join(_stops(plan, plan.rungs))} kimg")
    if best[1]:
        say(f"then the best {min(best[0], plan.num_trials)} again with {best[1]} new seed(s) each")
    say(f"at most {plan.most_kimg():g} kimg in all")
    return {
        "sweep": ledger.storage.location,
        "recipe": plan.base.recipe,
        "space": [str(dimension) for dimension in plan.dimensions],
        "algorithm": plan.sweep.algorithm,
        "seed": plan.base.seed,
        "trials": plan.num_trials,
        "values": listed,
        "cpus_per_trial": need.cpus,
        "gpus_per_trial": need.gpus,
        "at_once": at_once,
        "rungs": plan.rungs.kimg if plan.rungs else [],
        "kimg": plan.base.kimg,
        "most_kimg": plan.most_kimg(),
    }


def _resources(plan: Plan, nodes: list[Node]) -> tuple[Need, int]:
    """What each trial gets, and how many run at once."""
    sweep, readers = plan.sweep, plan.base.loader.workers
    need = decide_need(nodes, sweep.workers, readers, plan.num_trials, sweep.cpus, sweep.gpus)
    fitting = num_at_once(need, nodes)
    return need, min(fitting, sweep.at_once or fitting)


def _stops(plan: Plan, rungs: Rungs) -> list[str]:
    """Where trials are stopped, as kimg: a range for a rung that trials reach at different ones, as with batches."""
    chosen = plan.listed() or list(corners(plan.dimensions))
    found = [positions(plan.options(one, plan.base.seed), rungs) for one in chosen]
    ends = [(min(at), max(at)) for rung in rungs.kimg if (at := [one[rung] for one in found if rung in one])]
    return [f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}" for low, high in ends]


def _trial_name(number: int) -> str:
    return f"t{number:02d}"


class _Sweep:
    """A sweep whose folder is locked and that is connected to Ray."""

    def __init__(self, plan: Plan, ledger: Ledger, uri: str) -> None:
        self.plan, self.ledger, self.uri = plan, ledger, uri
        self.table = Table(ledger, plan.fields, plan.base.kimg)

    def run(self) -> dict[str, Any]:
        plan, ledger = self.plan, self.ledger
        ledger.storage.make()
        model = plan.base.model
        open_data(plan.base.data, model.size, plan.base.loader, model.conditional)  # drawn once, not by each trial
        need, at_once = _resources(plan, _nodes())
        say(f"{'continuing ' if ledger.id else ''}sweep {ledger.storage.location}, {at_once} trial(s) at a time")
        ledger.open(secrets.token_hex(8))
        status = "FAILED"
        try:
            with self.table.live():
                self._train(self._search(), need, at_once, plan.rungs)
                self._train(self._confirm(), need, at_once, None)
            status = "FINISHED"
        except (Stopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            result = self._end(status)
        if result is None:
            failed = [trial for trial in ledger.trials.values() if trial.status == "failed"]
            reason = f"; {failed[0].name}: {failed[0].message}" if failed else ""
            raise UserError(f"no trial of {ledger.storage.location} has come to an evaluation{reason}")
        return result

    def _search(self) -> Iterator[Trial]:
        """The trials that are left to train, those that were begun first."""
        plan, ledger = self.plan, self.ledger
        begun = [trial for trial in ledger.trials.values() if trial.of is None]
        yield from [trial for trial in begun if not trial.is_over]
        listed = plan.listed()
        tree = Tree(plan.dimensions, plan.base.seed) if listed is None else None
        for number in range(len(begun), plan.num_trials):
            chosen = tree.propose(ledger.trials) if tree else (listed or [])[number]
            yield ledger.add(Trial(_trial_name(number), chosen, plan.base.seed))

    def _confirm(self) -> Iterator[Trial]:
        """Repetitions of the best trials, a round of seeds after the other."""
        ledger, (best, seeds) = self.ledger, self.plan.sweep.confirm
        chosen = [trial for trial in rank(ledger.trials) if trial.status == "done"][:best]
        for shift in range(1, seeds + 1):
            for trial in chosen:
                name = f"{trial.name}-s{shift}"
                again = ledger.trials.get(name)
                if again is None:
                    again = ledger.add(Trial(name, trial.values, trial.seed + shift, trial.name))
                if not again.is_over:
                    yield again

    def _train(self, trials: Iterator[Trial], need: Need, at_once: int, rungs: Rungs | None) -> None:
        """Train trials with Tune, at most ``at_once`` at a time."""
        # With Ray Tune: seconds, which mistakes need not wait for.
        from trainer.sweeps.trial import Task, create_control
        from trainer.sweeps.tuning import run_trials

        control, ledger = create_control(), self.ledger

        def tasks() -> Iterator[Task]:
            for trial in trials:
                try:
                    options = self.plan.options(trial.values, trial.seed)
                except UserError as error:  # of values together, which tpe has proposed
                    ledger.ended(trial.name, "failed", str(error))
                    say(f"{trial.name} has failed: {error}")
                    continue
                yield Task(
                    name=trial.name,
                    options=replace(options, name=trial.name, out=ledger.storage.location),
                    location=ledger.storage.join(trial.name),
                    uri=redact(self.uri),
                    sweep={"id": ledger.id or "", "name": ledger.storage.name},
                    workers=need.workers,
                    resources=need.per_worker,
                    max_threads=_max_threads(),
                    control=control,
                )

        @cache
        def snapshot(name: str) -> float:
            trial = ledger.trials[name]
            return snapshot_kimg(self.plan.options(trial.values, trial.seed))

        waiting = tasks()
        for first in waiting:  # Tune cannot be asked to train nothing
            run_trials(chain([first], waiting), ledger, need, at_once, rungs, snapshot, control, self.table.changed)

    def _end(self, status: str) -> dict[str, Any] | None:
        """Print the table and the best so far, write ``sweep.html``, log the summary to MLflow. Returns the JSON
        object; None without any distance."""
        ledger, plan = self.ledger, self.plan
        verdict = decide(ledger.trials)
        if ledger.trials:
            self.table.show()
        result = self._result(verdict) if verdict else None
        content = page.render(plan, ledger, verdict, result["command"] if result else None, status).encode()
        try:
            ledger.write(page.NAME, content)
        except OSError as error:  # not worth losing the result for
            say(f"warning: no {ledger.storage.join(page.NAME)}: {brief(error)}")
        ledger.push()
        if result is None or plan.base.track.offline:
            return result
        run_id = log_sweep(
            self.uri,
            plan.base.track.experiment,
            {"id": ledger.id or "", "name": ledger.storage.name},
            user=os.environ.get("USER", "unknown"),
            tags={f"best.{field}": value for field, value in result["best"].items()},
            metrics={"sweep/distance": result["distance"], "sweep/trials": float(len(ledger.trials))},
            files={page.NAME: content, "sweep.json": json.dumps(result, indent=2).encode()},
            status=status,
        )
        return result | {"mlflow_run_id": run_id}

    def _result(self, verdict: Verdict) -> dict[str, Any]:
        """Print the verdict. Returns the JSON object."""
        plan, ledger = self.plan, self.ledger
        best, track = ledger.trials[verdict.best], plan.base.track
        kimg = max(plan.recipe.kimg, _LONGER * plan.base.kimg)
        is_beside = not (track.uri or track.offline or os.environ.get("MLFLOW_TRACKING_URI"))
        uri = self.uri if is_beside else None
        command = plan.command(best.values, best.seed, ledger.storage.location, best.name, kimg, uri)
        values = " ".join(f"{field}={value}" for field, value in best.values.items())
        error = f" +- {verdict.error:.2f}" if verdict.error is not None else ""
        say(f"best: {best.name}, {values}: {ledger.metric} {verdict.distance:.2f}{error} at {best.kimg:g} kimg")
        say(verdict.text)
        say(f"to train it for longer: {command}")
        statuses = [trial.status for trial in ledger.trials.values()]
        return {
            "sweep": ledger.storage.location,
            "trial": best.name,
            "best": best.values,
            "metric": ledger.metric,
            "distance": verdict.distance,
            "standard_error": verdict.error,
            "kimg": best.kimg,
            "is_more_than_noise": verdict.is_more_than_noise,
            "verdict": verdict.text,
            "trials": {status: statuses.count(status) for status in ("done", "stopped", "failed", "waiting")},
            "page": ledger.storage.join(page.NAME),
            "command": command,
        }


def _nodes() -> list[Node]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def _max_threads() -> int | None:
    """The number of threads that the user sets for this machine, if any."""
    is_chosen = "OMP_NUM_THREADS" in os.environ and cluster_address() is None
    return torch.get_num_threads() if is_chosen else None
