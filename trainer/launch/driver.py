"""What ``trainer/run.py`` does: resolve, check, open the MLflow run, train, export the best generator, register it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.location import join
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saver import BEST
from trainer.checkpoints.storage import Bucket, Storage, open_storage
from trainer.data.manifest import Manifest
from trainer.data.open import NUM, open_data
from trainer.launch import worker as launch
from trainer.launch.checks import problems
from trainer.launch.finish import finish, leave_report, summary
from trainer.launch.options import Options, parse, parse_workers, split_recipe, value_of
from trainer.launch.worker import Workers
from trainer.loop import plan, stalled
from trainer.models import build_discriminator, build_generator, grown_kimg, num_parameters
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.tracking import server
from trainer.tracking import tracker as tracking
from trainer.tracking.outbox import brief, redact
from trainer.tracking.recorder import Position


def main(argv: list[str]) -> dict[str, Any]:
    """Train, or with ``--dry-run`` say what would be trained. Returns the JSON object for stdout."""
    name, rest = split_recipe(argv)
    data = value_of(rest, "--data")
    manifest = Manifest.load(data) if data else None
    gpus = launch.cluster_gpus()
    recipe = resolve(name, manifest.size if manifest else None, gpus > 0)
    options = parse(rest, recipe, _description())
    workers: Workers = parse_workers(options.workers) if options.workers is not None else max(gpus, 1)
    _check(options, manifest, workers)
    storage = _open(options)
    resume_from = _resume_from(options.resume, storage)
    init_from = _init_from(options, resume_from, storage)
    _warn(options)
    if options.dry_run:
        return _dry_run(options, manifest, workers, storage, resume_from)
    return _train(options, workers, storage, resume_from, init_from)


def _description() -> str:
    families = "\n".join(f"  {name:11s} {family.summary}" for name, family in FAMILIES.items())
    sizes = ", ".join(map(str, SIZES))
    return (
        "Train a GAN on shards and export the best generator to ONNX.\n\n"
        f"RECIPE is a family, which takes the size of the data, or family-size (sizes {sizes}):\n{families}\n\n"
        "Examples:\n"
        "  run.py --dry-run                              what would happen\n"
        "  run.py --workers 0                            in this process: a laptop, one GPU\n"
        "  run.py r3gan-64 --data shards/cats64          Ray Train, a worker per GPU\n"
        "  run.py --name mine --kimg 500                 run it again to continue\n"
    )


def _check(options: Options, manifest: Manifest | None, workers: Workers) -> None:
    """All that is wrong, in one line.

    Raises:
        UserError: anything is.
    """
    found = problems(options.config())
    size = options.model.size
    if manifest and manifest.size != size:
        found.append(
            f"{options.recipe} trains at {size}x{size} but the shards hold {manifest.size}x{manifest.size} pictures;"
            f" take a recipe of that size or build shards with --size {size}"
        )
    if manifest and not manifest.splits["train"].images:
        found.append(f"--data {options.data}: no pictures in the train split")
    most = workers if isinstance(workers, int) else workers[1]
    if most > options.batch:
        found.append(
            f"--workers {most} with --batch {options.batch}: each worker needs a picture; ask for fewer workers"
        )
    elif options.batch // max(most, 1) < options.accumulate:
        found.append(
            f"--workers {most} with --batch {options.batch} and --accumulate {options.accumulate}: each part needs a"
            " picture; accumulate less"
        )
    if options.name is not None and Path(options.name).name != options.name:
        found.append(f"--name {options.name!r}: give a plain name without slashes")
    if found:
        raise UserError("; ".join(found))


def _open(options: Options) -> Storage:
    tail = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return open_storage(join(options.out or _default_out(), options.name or f"{options.recipe}-{tail}"))


def _default_out() -> Path:
    """``out/runs`` here; in a Ray job the working folder is a temporary copy, so ``~/catgan/runs``."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / "catgan" / "runs" if in_job else Path("out", "runs").resolve()


def _resume_from(resume: str, storage: Storage) -> str | None:
    """The checkpoint of another run to start from; None: the newest of this one, if there is any, or afresh.

    Raises:
        UserError: ``--resume never`` and there is one, or the path is not one.
    """
    if resume == "auto":
        return None
    has_own = bool(storage.checkpoints())
    if resume == "never":
        if has_own:
            raise UserError(
                f"--resume never: {storage.location} already holds checkpoints; give another --name, or --resume auto"
                " to continue"
            )
        return None
    if has_own:
        say(f"--resume {resume} has no effect: continuing from {storage.location}")
        return None
    given = open_storage(resume)
    if names := given.checkpoints():
        return given.join(names[-1])
    parent, _, name = given.location.rpartition("/")
    if name in open_storage(parent).checkpoints():
        return given.location
    raise UserError(f"--resume {resume}: neither auto nor never, nor a checkpoint or run folder")


def _warn(options: Options) -> None:
    """Say what is allowed but seldom meant."""
    if options.kimg < (grown := grown_kimg(options)):
        say(
            f"warning: --kimg {options.kimg:g}, but {options.recipe} takes {grown:g} to grow up; give more, or shorter"
            " --grow.hold-kimg and --grow.fade-kimg"
        )


def _init_from(options: Options, resume_from: str | None, storage: Storage) -> Path | None:
    """Where a new run takes its weights from.

    Raises:
        UserError: there is nothing.
    """
    if options.init_from is None:
        return None
    if resume_from is not None or storage.checkpoints():
        say(f"--init-from has no effect: continuing from {resume_from or storage.location}")
        return None
    path = Path(options.init_from).expanduser().resolve()
    if not checkpoint.holds_weights(path):
        raise UserError(f"--init-from {options.init_from}: give a run's folder, a checkpoint or a .safetensors file")
    return path


def _dry_run(
    options: Options, manifest: Manifest | None, workers: Workers, storage: Storage, resume_from: str | None
) -> dict[str, Any]:
    config = options.config()
    most = workers if isinstance(workers, int) else workers[1]
    tick, snapshot, steps = plan(config)
    data = options.data or f"{NUM} drawn cats"
    begin = resume_from or next((storage.join(name) for name in storage.checkpoints()[-1:]), None)
    parameters = {
        "generator": num_parameters(build_generator(config.model)),
        "discriminator": num_parameters(build_discriminator(config.model)),
    }
    say(f"would train {config.recipe} on {data}, {config.kimg:g} kimg in {steps} steps of {config.batch} pictures,")
    who = f"with {options.workers or most} worker(s)" if most else "in this process"
    say(f"{who}, from {begin or 'the beginning'}, in {storage.location}")
    say(", ".join(f"{name} {number / 1e6:.2f} million parameters" for name, number in parameters.items()))
    return {
        "recipe": config.recipe,
        "config": config.to_dict(),
        "run_dir": storage.location,
        "resume_from": begin,
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
    options: Options, workers: Workers, storage: Storage, resume_from: str | None, init_from: Path | None
) -> dict[str, Any]:
    config = options.config()
    manifest = open_data(options.data, config.model.size, config.loader)
    storage.make()
    with _in_words(storage):
        storage.pull()
    # Beside a bucket an SQLite file cannot lie.
    uri = server.resolve_uri(config.track.uri, _default_out() if isinstance(storage, Bucket) else storage.work.parent)
    if config.track.uri and config.track.uri != (public := redact(config.track.uri)):
        # A password is for this process and what inherits its environment, not for what is written or sent.
        os.environ["MLFLOW_TRACKING_URI"] = uri
        config = replace(config, track=replace(config.track, uri=public))
        if workers and "RAY_ADDRESS" in os.environ:
            say(
                "warning: the password in --track.uri is not sent to the cluster; without one in the environment of its"
                " nodes (docs/cluster.md) MLflow gets the records at the end"
            )
    known = _recorded_run_id(storage.work, uri)
    if (newest := storage.newest()) is not None:
        _, state = newest
        known = state["run_id"]
        position = Position(state["nimg"], state["best"], state["last_metric"])
        is_done = position.nimg >= config.kimg * 1000 or stalled(config, position)
        if is_done and tracking.is_finished(storage.work):
            longer = "--kimg" if position.nimg >= config.kimg * 1000 else "--stop.patience-kimg"
            say(f"{storage.location} is finished; a larger {longer} trains it further")
            return summary(storage)
    with _in_words(storage):
        run_id = tracking.open_run(
            storage.work,
            uri,
            config.track.experiment,
            config=config.to_dict(),
            manifest=manifest,
            run_id=known,
            offline=config.track.offline,
        )
        surroundings = {
            "data": manifest.root,
            "dataset_digest": manifest.digest,
            "mlflow_run_id": run_id,
            "tracking_uri": redact(uri),
        }
        storage.write("config.json", json.dumps(config.to_dict() | surroundings, indent=2).encode() + b"\n")
        storage.push()
    say(f"run {storage.location}")
    job = launch.Job(
        config=config.to_dict(),
        data=manifest.root if options.data else None,
        location=storage.location,
        tracking_uri=redact(uri),
        run_id=run_id,
        resume_from=resume_from,
        init_from=str(init_from) if init_from else None,
    )
    status: tracking.Status = "FAILED"
    is_here = False
    try:
        try:
            outcome = launch.run_in_process(job) if workers == 0 else launch.run_on_ray(job, workers)
        finally:
            # Rank 0 may have worked on another machine. Its records come first: what is added to older ones here, and
            # pushed, would replace them.
            with _in_words(storage):
                storage.pull()
            is_here = True
        if outcome.status == "stopped":
            status = "KILLED"
            say(f"stopped after a checkpoint; to continue, give --name {storage.name}")
            raise SystemExit(128 + signal.SIGTERM)
        is_trained = (storage.work / BEST).is_file()
        if is_trained:
            with _in_words(storage):
                finish(storage.work, config.track.model, manifest.root)
        if outcome.status == "diverged":
            kept = "the best generator until then is exported" if is_trained else "nothing is there to export"
            raise UserError(f"{outcome.message}; {kept}; lower --optim.g-lr and --optim.d-lr, or give --stop.rollbacks")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        say(f"interrupted; to continue, give --name {storage.name}")
        raise
    finally:
        if is_here:
            leave_report(storage.work, status)
            with _in_words(storage):
                tracking.end_run(storage.work, uri, status, config.track.offline)
                storage.push()
    return summary(storage)


@contextlib.contextmanager
def _in_words(storage: Storage) -> Iterator[None]:
    """Make what a disk or a bucket refuses inside the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{storage.location} cannot be read or written ({brief(error)}); mend that, then run the same command again"
        ) from error


def _recorded_run_id(run_dir: Path, uri: str) -> str | None:
    """The MLflow run of a training that was cut off before its first checkpoint: it is continued, not doubled."""
    try:
        recorded = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return recorded.get("mlflow_run_id") if recorded.get("tracking_uri") == redact(uri) else None
