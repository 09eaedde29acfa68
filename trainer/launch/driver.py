"""The driver of ``trainer/run.py``: resolve the configuration, check it, open the MLflow run, train, export the best
generator and register it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from catgan.command import UserError, say
from catgan.dataset import Manifest
from catgan.location import join
from export.registry import register
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saver import BEST
from trainer.checkpoints.storage import Bucket, Storage, open_storage
from trainer.config import Config
from trainer.data.open import NUM_DRAWN, open_data
from trainer.launch.checks import check_options
from trainer.launch.classes import with_classes
from trainer.launch.connect import Workers, cluster_address, cluster_gpus, connect_ray
from trainer.launch.finish import finish, summary, write_final_report
from trainer.launch.machine import check_machine
from trainer.launch.options import Options, asks_for_help, parse, parse_workers, split_recipe, value_of
from trainer.launch.ray import run_on_ray
from trainer.launch.signals import Stopped
from trainer.launch.start import Start, find_start, is_complete, is_finished, only_training
from trainer.launch.unused import without_effect
from trainer.launch.worker import Job, run_in_process
from trainer.loop import Outcome, plan
from trainer.models import build_discriminator, build_generator, full_resolution_kimg, num_parameters
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.tracking import server
from trainer.tracking import tracker as tracking
from trainer.tracking.messages import brief, redact

_MANY = 2000
"""Training images with which a discriminator does not memorise them early."""


def main(argv: list[str]) -> dict[str, Any]:
    """Train, or with ``--dry-run`` print the plan of the training. Returns the JSON object for stdout."""
    name, rest = split_recipe(argv)
    data = None if asks_for_help(rest) else value_of(rest, "--data")
    manifest = Manifest.load(data) if data else None
    gpus = num_gpus(rest)
    recipe = resolve(name, manifest.size if manifest else None, gpus > 0)
    options = with_classes(parse(rest, with_environment(recipe), _description()), manifest)
    workers: Workers = parse_workers(options.workers) if options.workers is not None else max(gpus, 1)
    check_options(options, manifest, workers)
    storage = _open(options)
    uri = server.resolve_uri(options.track.uri, folder_beside(storage))
    check_machine(options, storage, elsewhere=workers != 0 and cluster_address() is not None)
    _warn(options, workers, gpus)
    if options.dry_run:
        return _dry_run(options, manifest, workers, storage)
    # Ray prints messages of nodes to stdout, which is for the JSON object.
    with only_training(storage), contextlib.redirect_stdout(sys.stderr):
        start = find_start(options, storage)
        if start.position.nimg >= options.kimg * 1000:
            workers = 0  # the export at most is left
        if workers:
            connect_ray(workers)
        return _train(options, workers, storage, uri, start)


def train_with(
    options: Options, storage: Storage, uri: str, execute: Callable[[Job], Outcome], sweep: Mapping[str, str]
) -> dict[str, Any]:
    """Train as a trial of a sweep, like ``main`` with valid options, by a function of its own.

    Args:
        uri: MLflow's tracking URI.
        execute: trains and returns the outcome, or raises ``Stopped`` if there is a checkpoint to continue from.
        sweep: ``id`` and ``name`` of the sweep, see ``tracker.open_run``.

    Returns:
        The summary of the run, see ``finish.summary``.

    Raises:
        UserError, Stopped: as for ``main``.
    """
    with only_training(storage):
        return _train(options, 1, storage, uri, find_start(options, storage), execute, sweep)


def num_gpus(argv: list[str]) -> int:
    """Number of GPUs to train on: of the cluster at RAY_ADDRESS if it is set, else of this machine. Where a plan cannot
    ask the cluster, it is that of this machine, with a message."""
    if cluster_address() is None or asks_for_help(argv) or value_of(argv, "--workers") == "0":
        return torch.cuda.device_count()
    try:
        return cluster_gpus()
    except UserError as error:
        if "--dry-run" not in (word.replace("_", "-") for word in argv):
            raise
        say(f"the cluster is not asked for its GPUs, so this is the plan on this machine: {error}")
        return torch.cuda.device_count()


def with_environment(recipe: Config) -> Config:
    """``recipe`` with the experiment that MLflow's own variable names."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.track.experiment
    return replace(recipe, track=replace(recipe.track, experiment=name))


def _description() -> str:
    families = "\n".join(f"  {name:11s} {family.summary}" for name, family in FAMILIES.items())
    sizes = ", ".join(map(str, SIZES))
    return (
        "Train a GAN on shards and export the best generator to ONNX.\n\n"
        f"RECIPE is a family, which takes the size of the data, or family-size (sizes {sizes}):\n{families}\n\n"
        "An option with .start, .end and .kimg is a schedule. Without a suffix it takes one number, a constant:\n"
        "--optim.g-lr 1e-4.\n\n"
        "Examples:\n"
        "  run.py --dry-run                              print the plan, train nothing\n"
        "  run.py --workers 0                            in this process: a laptop, one GPU\n"
        "  run.py r3gan-64 --data shards/cats64          Ray Train, a worker per GPU\n"
        "  run.py --name mine --kimg 500                 run it again to continue\n"
    )


def _open(options: Options) -> Storage:
    """The storage of the run called ``--name``, or of a new name."""
    tail = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return open_storage(join(options.out or default_out(), options.name or f"{options.recipe}-{tail}"))


def default_out() -> Path:
    """``out/runs``; in a Ray job, where the working folder is a temporary copy, ``~/catgan/runs``."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / "catgan" / "runs" if in_job else Path("out", "runs").resolve()


def folder_beside(storage: Storage) -> Path:
    """The folder for MLflow's SQLite file: that of the runs. Such a file cannot be in a bucket."""
    return default_out() if isinstance(storage, Bucket) else storage.work.parent


def _warn(options: Options, workers: Workers, gpus: int) -> None:
    """Warn about legal but unlikely settings, and about threads that other processes will hold up."""
    fewest = workers if isinstance(workers, int) else workers[0]
    threads, load = torch.get_num_threads() // max(fewest, 1), os.getloadavg()[0]
    if not gpus and cluster_address() is None and "OMP_NUM_THREADS" not in os.environ and 1 < threads < 2 * load:
        say(
            f"warning: other processes use this machine (load {load:.1f}), and {threads} threads would wait for each"
            " other; OMP_NUM_THREADS=1 is probably faster"
        )
    if os.environ.get("MLFLOW_EXPERIMENT_ID"):
        say("warning: MLFLOW_EXPERIMENT_ID is not used; name the experiment by MLFLOW_EXPERIMENT_NAME")
    for sentence in without_effect(options.config()):
        say(f"warning: {sentence}")
    if options.kimg < (needed := full_resolution_kimg(options)):
        say(
            f"warning: --kimg {options.kimg:g}, but {options.recipe} reaches full resolution at {needed:g}; give more,"
            " or shorter --grow.hold-kimg and --grow.fade-kimg"
        )


def _dry_run(options: Options, manifest: Manifest | None, workers: Workers, storage: Storage) -> dict[str, Any]:
    """Print the plan of the training. Returns the JSON object for stdout."""
    config, start = options.config(), find_start(options, storage)
    most = workers if isinstance(workers, int) else workers[1]
    tick, snapshot, steps = plan(config)
    data = options.data or f"{NUM_DRAWN} drawn cats"
    if is_complete(config, start.position):
        is_finished(config, start.position, storage)
    parameters = {
        "generator": num_parameters(build_generator(config.model)),
        "discriminator": num_parameters(build_discriminator(config.model)),
    }
    say(f"would train {config.recipe} on {data}, {config.kimg:g} kimg in {steps} steps of {config.batch} images,")
    where = f"with {options.workers or most} worker(s)" if most else "in this process"
    begin = f"{start.checkpoint} ({start.position.nimg / 1000:g} kimg)" if start.checkpoint else "the beginning"
    say(f"{where}, from {begin}, in {storage.location}")
    say(", ".join(f"{name} {number / 1e6:.2f} million parameters" for name, number in parameters.items()))
    return {
        "recipe": config.recipe,
        "config": config.to_dict(),
        "run_dir": storage.location,
        "resume_from": start.checkpoint,
        "parameters": parameters,
        "workers": workers,
        "batch_per_worker": config.batch / max(most, 1),
        "steps": steps,
        "steps_per_tick": tick,
        "steps_per_snapshot": snapshot,
        "data": data,
        "images": manifest.splits["train"].images if manifest else None,
        "shards": len(manifest.splits["train"].shards) if manifest else None,
    }


def _train(
    options: Options,
    workers: Workers,
    storage: Storage,
    uri: str,
    start: Start,
    execute: Callable[[Job], Outcome] | None = None,
    sweep: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train, export the best generator and register it. Returns the JSON object for stdout.

    Args:
        uri: MLflow's tracking URI.
        execute: trains; default: in this process or on Ray, depending on ``workers``.
        sweep: the sweep that the training belongs to.

    Raises:
        UserError: the data, the run's folder or MLflow cannot be used, or the training failed.
        Stopped: after Ctrl-C or SIGTERM.
    """
    manifest = open_data(options.data, options.model.size, options.loader, options.model.conditional)
    storage.make()
    with _storage_errors(storage):
        if aside := storage.set_aside():
            say(f"{storage.location} was deleted since it was trained; the files of that run on this machine: {aside}")
        storage.pull()
    recorded = _recorded(storage.work)
    if recorded and recorded.get("dataset_digest") not in (None, manifest.digest):
        say(
            f"warning: {storage.location} was trained on {recorded.get('data')} so far, and --data has other images;"
            " for a run of its own give another --name"
        )
    config = _without_password(options.config(), uri, workers)
    if is_finished(config, start.position, storage):
        return summary(storage)
    run_id = _open_run(config, manifest, storage, uri, start.run_id or _run_id(recorded, uri), sweep)
    images = manifest.splits["train"].images
    if images < _MANY and options.init_from is None:
        alone = (
            "" if options.augment.policy else "; --augment.policy translation cutout --augment.p 1 helps without one"
        )
        say(
            f"warning: {images:,} training images are few: the recipe `few` continues from a generator of similar"
            f" images, see docs/recipes.md{alone}"
        )
    job = Job(
        config=config.to_dict(),
        data=manifest.root if options.data else None,
        location=storage.location,
        tracking_uri=redact(uri),
        run_id=run_id,
        resume_from=None if start.is_own else start.checkpoint,
        init_from=str(start.init_from) if start.init_from else None,
    )
    if execute is None:
        execute = run_in_process if workers == 0 else partial(run_on_ray, workers=workers)
    # Of the many trials of a sweep one is the best by luck, so none becomes a version of the model.
    _run(job, execute, config, storage, uri, None if sweep else config.track.model)
    return summary(storage)


def _run(
    job: Job, execute: Callable[[Job], Outcome], config: Config, storage: Storage, uri: str, model: str | None
) -> None:
    """Run the training of an MLflow run that is open, export its best generator, register it as ``model`` unless that
    is None, and close the run however that ends."""
    with contextlib.ExitStack() as end:
        try:
            outcome = execute(job)
        finally:
            # Rank 0 may have run on another machine. Its files must be here before others are written and pushed.
            with _storage_errors(storage):
                storage.pull()
            end.enter_context(_recorded_end(storage, uri, config.track.offline))
        _export(outcome, storage, model)


def _without_password(config: Config, uri: str, workers: Workers) -> Config:
    """The configuration without a password in ``--track.uri``, since it is written to files and sent to workers. The
    password is kept in MLFLOW_TRACKING_URI, for this process and its children."""
    if not config.track.uri or config.track.uri == (public := redact(config.track.uri)):
        return config
    os.environ["MLFLOW_TRACKING_URI"] = uri
    if workers and cluster_address() is not None:
        say(
            "warning: the password in --track.uri is not sent to the cluster; without one in the environment of its"
            " nodes (docs/cluster.md) MLflow gets the records at the end"
        )
    return replace(config, track=replace(config.track, uri=public))


def _recorded(run_dir: Path) -> dict[str, Any]:
    """What ``config.json`` of the run in a folder says, empty for a new run."""
    try:
        recorded: dict[str, Any] = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return recorded


def _run_id(recorded: Mapping[str, Any], uri: str) -> str | None:
    """The MLflow run of a training that was interrupted before its first checkpoint. It is continued instead of opening
    a second one."""
    return recorded.get("mlflow_run_id") if recorded.get("tracking_uri") == redact(uri) else None


def _open_run(
    config: Config,
    manifest: Manifest,
    storage: Storage,
    uri: str,
    run_id: str | None,
    sweep: Mapping[str, str] | None,
) -> str:
    """Open the MLflow run and write ``config.json``. Returns the id of the run."""
    with _storage_errors(storage):
        run_id = tracking.open_run(
            storage.work,
            uri,
            config.track.experiment,
            config=config.to_dict(),
            manifest=manifest,
            register=register,
            run_id=run_id,
            offline=config.track.offline,
            sweep=sweep,
        )
        origin = {
            "data": manifest.root,
            "dataset_digest": manifest.digest,
            "mlflow_run_id": run_id,
            "tracking_uri": redact(uri),
        }
        storage.write("config.json", json.dumps(config.to_dict() | origin, indent=2).encode() + b"\n")
        storage.push()
    say(f"run {storage.location}")
    return run_id


def _export(outcome: Outcome, storage: Storage, model: str | None) -> None:
    """Export the best generator of a training that is over, if there is one, and register it as ``model``.

    Raises:
        UserError: the training diverged, or there is no generator to export.
    """
    has_best = (storage.work / BEST).is_file()
    if has_best:
        with _storage_errors(storage):
            finish(storage.work, model)
    if outcome.status == "done" and not has_best:
        raise UserError(f"{storage.location} has no evaluated generator; a larger --kimg trains it further")
    if outcome.status == "diverged":
        kept = "the best generator until then is exported" if has_best else "there is no generator to export"
        raise UserError(f"{outcome.message}; {kept}; lower --optim.g-lr and --optim.d-lr, or raise --stop.rollbacks")


@contextlib.contextmanager
def _recorded_end(storage: Storage, uri: str, offline: bool) -> Iterator[None]:
    """Record how the block ends: write the report, set the final status in MLflow, push the run's files."""
    status: tracking.Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as error:
        status = "KILLED"
        how = "stopped after a checkpoint" if isinstance(error, Stopped) else "interrupted"
        if latest := storage.checkpoints()[-1:]:
            kimg = checkpoint.position(latest[0]) / 1000
            say(f"{how}; to continue from {kimg:g} kimg, give --name {storage.name}")
        else:
            say(f"{how}; nothing was saved: there is no checkpoint yet")
        raise
    finally:
        write_final_report(storage.work, status)
        with _storage_errors(storage):
            tracking.end_run(storage.work, uri, status, offline, register=register, location=storage.location)
            storage.push()


@contextlib.contextmanager
def _storage_errors(storage: Storage) -> Iterator[None]:
    """Turn the ``OSError`` of a disk or bucket into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{storage.location} cannot be read or written ({brief(error)}); repair it, then run the same command again"
        ) from error
