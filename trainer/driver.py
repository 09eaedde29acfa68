"""What ``trainer/run.py`` does: resolve, check, open the MLflow run, train, export the best generator, register it."""

from __future__ import annotations

import datetime
import json
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer.command import UserError, say
from trainer import checkpoint, launch, server, tracking
from trainer.checks import problems
from trainer.data.drawn import NUM, open_data
from trainer.data.manifest import Manifest
from trainer.finish import finish, summary
from trainer.launch import Workers
from trainer.loop import plan, stalled
from trainer.models import build_discriminator, build_generator, grown_kimg, num_parameters
from trainer.options import Options, parse, parse_workers, split_recipe, value_of
from trainer.outbox import redact
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.recorder import Position


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
    run_dir = _run_dir(options)
    resume_from = _resume_from(options.resume, run_dir)
    init_from = _init_from(options, resume_from)
    _warn(options)
    if options.dry_run:
        return _dry_run(options, manifest, workers, run_dir, resume_from)
    return _train(options, workers, run_dir, resume_from, init_from)


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
    if options.out and "://" in options.out:
        found.append(f"--out {options.out}: give a folder (shared by all nodes); URLs are not supported yet")
    if options.name is not None and Path(options.name).name != options.name:
        found.append(f"--name {options.name!r}: give a plain name without slashes")
    if found:
        raise UserError("; ".join(found))


def _run_dir(options: Options) -> Path:
    out = Path(options.out).expanduser().resolve() if options.out else _default_out()
    tail = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return out / (options.name or f"{options.recipe}-{tail}")


def _default_out() -> Path:
    """``out/runs`` here; in a Ray job the working folder is a temporary copy, so ``~/catgan/runs``."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / "catgan" / "runs" if in_job else Path("out", "runs").resolve()


def _resume_from(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint folder to start from.

    Raises:
        UserError: ``--resume never`` and there is one, or the path is not one.
    """
    found = checkpoint.find_all(run_dir)
    if resume == "auto":
        return found[-1] if found else None
    if found:
        raise UserError(
            f"--resume {resume}: {run_dir} already holds checkpoints; give another --name, or --resume auto to continue"
        )
    if resume == "never":
        return None
    path = Path(resume).expanduser().resolve()
    candidates = [path] if (path / "state.pt").is_file() else checkpoint.find_all(path)
    if not candidates:
        raise UserError(f"--resume {resume}: neither auto nor never, nor a checkpoint or run folder")
    return candidates[-1]


def _warn(options: Options) -> None:
    """Say what is allowed but seldom meant."""
    if options.kimg < (grown := grown_kimg(options)):
        say(
            f"warning: --kimg {options.kimg:g}, but {options.recipe} takes {grown:g} to grow up; give more, or shorter"
            " --grow.hold-kimg and --grow.fade-kimg"
        )


def _init_from(options: Options, resume_from: Path | None) -> Path | None:
    """Where a new run takes its weights from.

    Raises:
        UserError: there is nothing.
    """
    if options.init_from is None:
        return None
    if resume_from is not None:
        say(f"--init-from has no effect: continuing from {resume_from}")
        return None
    path = Path(options.init_from).expanduser().resolve()
    if not checkpoint.holds_weights(path):
        raise UserError(f"--init-from {options.init_from}: give a run's folder, a checkpoint or a .safetensors file")
    return path


def _dry_run(
    options: Options, manifest: Manifest | None, workers: Workers, run_dir: Path, resume_from: Path | None
) -> dict[str, Any]:
    config = options.config()
    most = workers if isinstance(workers, int) else workers[1]
    tick, snapshot, steps = plan(config)
    return {
        "recipe": config.recipe,
        "config": config.to_dict(),
        "run_dir": str(run_dir),
        "resume_from": str(resume_from) if resume_from else None,
        "parameters": {
            "generator": num_parameters(build_generator(config.model)),
            "discriminator": num_parameters(build_discriminator(config.model)),
        },
        "workers": workers,
        "batch_per_worker": config.batch / max(most, 1),
        "steps": steps,
        "steps_per_tick": tick,
        "steps_per_snapshot": snapshot,
        "data": options.data or f"{NUM} drawn cats",
        "images": manifest.splits["train"].images if manifest else None,
        "shards": len(manifest.splits["train"].shards) if manifest else None,
    }


def _train(
    options: Options, workers: Workers, run_dir: Path, resume_from: Path | None, init_from: Path | None
) -> dict[str, Any]:
    config = options.config()
    manifest = open_data(options.data, config.model.size, config.loader)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run_dir} ({error.strerror}); give another --out") from error
    uri = server.resolve_uri(config.track.uri, run_dir.parent)
    # A password in the address is for this process and its workers, not for what is written.
    config = replace(config, track=replace(config.track, uri=config.track.uri and redact(config.track.uri)))
    # A checkpoint of another run is only a starting point: what it grows into is a run of its own.
    known = _recorded_run_id(run_dir, uri)
    if resume_from is not None and resume_from.parent == run_dir:
        state = checkpoint.load(resume_from)
        known = state["run_id"]
        position = Position(state["nimg"], state["best"], state["last_metric"])
        is_done = position.nimg >= config.kimg * 1000 or stalled(config, position)
        if is_done and tracking.is_finished(run_dir):
            longer = "--kimg" if position.nimg >= config.kimg * 1000 else "--stop.patience-kimg"
            say(f"{run_dir} is finished; a larger {longer} trains it further")
            return summary(run_dir)
    run_id = tracking.open_run(
        run_dir,
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
    _write_json(run_dir / "config.json", config.to_dict() | surroundings)
    say(f"run {run_dir}")
    job = launch.Job(
        config=config.to_dict(),
        data=manifest.root if options.data else None,
        run_dir=str(run_dir),
        tracking_uri=uri,
        run_id=run_id,
        resume_from=str(resume_from) if resume_from else None,
        init_from=str(init_from) if init_from else None,
    )
    status: tracking.Status = "FAILED"
    try:
        if workers == 0:
            launch.run_in_process(job)
        else:
            launch.run_on_ray(job, workers)
        finish(run_dir, config.track.model)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        say(f"interrupted; to continue, give --name {run_dir.name}")
        raise
    finally:
        tracking.end_run(run_dir, uri, status, config.track.offline)
    return summary(run_dir)


def _recorded_run_id(run_dir: Path, uri: str) -> str | None:
    """The MLflow run of a training that was cut off before its first checkpoint: it is continued, not doubled."""
    try:
        recorded = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return recorded.get("mlflow_run_id") if recorded.get("tracking_uri") == redact(uri) else None


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
