"""What ``trainer/run.py`` does: resolve, check, open the MLflow run, train, export the best generator, register it."""

from __future__ import annotations

import datetime
import json
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.card import write_card
from export.generator import export_onnx, metadata
from export.registry import register
from infer.command import UserError, say
from trainer import checkpoint, launch, tracking
from trainer.config import Config, problems
from trainer.data import drawn
from trainer.data.shards import Manifest
from trainer.models import build_discriminator, build_generator, num_parameters
from trainer.loop import plan
from trainer.options import Options, parse, parse_workers, split_recipe
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.recorder import progress_gif


def main(argv: list[str]) -> dict[str, Any]:
    """Train, or with ``--dry-run`` say what would be trained. Returns the JSON object for stdout."""
    name, rest = split_recipe(argv)
    data = _value_of(rest, "--data")
    manifest = Manifest.load(data) if data else None
    gpus = launch.cluster_gpus()
    recipe = resolve(name, manifest.size if manifest else None, gpus > 0)
    options = parse(rest, recipe, _description())
    workers = _workers(options.workers, gpus)
    _check(options, manifest, workers)
    config = options.config()
    run_dir = _run_dir(options)
    resume_from = _resume_from(options, run_dir)
    if options.dry_run:
        return _plan(config, options, manifest, workers, run_dir, resume_from)
    return _train(config, options, workers, run_dir, resume_from)


def _train(
    config: Config, options: Options, workers: int | tuple[int, int], run_dir: Path, resume_from: Path | None
) -> dict[str, Any]:
    manifest = drawn.open_data(options.data, config.model.size)
    run_dir.mkdir(parents=True, exist_ok=True)
    uri = tracking.resolve_uri(config.track.uri, run_dir.parent)
    known = checkpoint.load(resume_from).get("run_id") if resume_from else None
    run_id = tracking.open_run(
        uri, config.track.experiment, run_dir.name, run_id=known, config=config.to_dict(), manifest=manifest
    )
    _write_json(run_dir / "config.json", config.to_dict() | {"data": options.data, "workers": options.workers})
    say(f"run {run_dir}")
    job = launch.Job(
        config=config.to_dict(),
        data=str(Path(options.data).resolve()) if options.data else None,
        run_dir=str(run_dir),
        tracking_uri=uri,
        run_id=run_id,
        resume_from=str(resume_from) if resume_from else None,
    )
    status = "FAILED"
    try:
        if workers == 0:
            launch.run_in_process(job)
        else:
            launch.run_on_ray(job, workers)
        result = _finish(run_dir, uri, run_id, config, manifest)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        say(f"interrupted; continue with --name {run_dir.name}")
        raise
    finally:
        tracking.close_run(uri, run_id, status)
    return {"run_dir": str(run_dir), "mlflow_run_id": run_id, **result}
