"""Find the generator that ``catexport`` exports: on this machine, in a bucket, or in MLflow."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import UserError
from catgan.location import resolved_path

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from trainer.models import Generator

WEIGHTS = "gen.safetensors"

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def is_in_mlflow(source: str) -> bool:
    """Whether ``source`` names a run or a registered model of MLflow instead of a path."""
    return source.startswith(("runs:/", "models:/")) or (
        _RUN_ID.fullmatch(source) is not None and not Path(source).exists()
    )


def is_in_bucket(source: str) -> bool:
    """Whether ``source`` is a URL, such as s3://bucket/runs/mine."""
    return "://" in source


@dataclass(frozen=True)
class Source:
    """A trained generator and its origin."""

    generator: Generator
    info: dict[str, Any]
    """See ``trainer.checkpoints.checkpoint.load_generator``."""
    weights: bytes | None = None
    """The gen.safetensors that it was read from; None for a checkpoint."""
    data: str | None = None
    """Path or URL of its training data, if known."""


def open_source(source: str, uri: str | None) -> Source:
    """Load the generator that ``source`` names.

    Args:
        source: a path (see ``load_generator``); the URL of a run in a bucket; or in MLflow a run id with or without
            ``runs:/``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        uri: MLflow's tracking server and registry; needed for sources in MLflow only.

    Raises:
        UserError: there is no such generator, or MLflow cannot be reached.
    """
    if is_in_bucket(source):
        return _load_from_bucket(source)
    if not is_in_mlflow(source):
        return _load(Path(source))
    assert uri is not None
    with _download_weights(source, uri) as path:
        return _load(path)


def _load_from_bucket(location: str) -> Source:
    from trainer.checkpoints.storage import open_storage

    storage = open_storage(location)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = storage.copy(["config.json", "best", WEIGHTS], Path(scratch))
        except OSError as error:
            raise UserError(f"{location}: cannot be read ({error.strerror or error})") from error
        if not any(folder.rglob(WEIGHTS)):
            raise UserError(f"{location} holds no best generator; give the URL of a run that was evaluated")
        return _load(folder)


def _load(path: Path) -> Source:
    from trainer.checkpoints.checkpoint import load_generator

    generator, info = load_generator(path)
    released = (path, path / WEIGHTS, path / "best" / WEIGHTS)  # in the order of load_generator
    file = next((p for p in released if p.suffix == ".safetensors" and p.is_file()), None)
    return Source(generator, info, file.read_bytes() if file else None, _recorded_data(path))


def _recorded_data(path: Path) -> str | None:
    """The training data in ``config.json`` of the run that ``path`` is or belongs to."""
    path = resolved_path(path)
    for folder in (path, *list(path.parents)[:2]):
        try:
            recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        data = recorded.get("data")
        return data if isinstance(data, str) else None
    return None


@contextmanager
def _download_weights(source: str, uri: str) -> Iterator[Path]:
    """A temporary copy of the generator's weights in MLflow."""
    from trainer.tracking.messages import brief
    from trainer.tracking.server import connect, mlflow_errors, server_name

    client = connect(uri)
    import mlflow.artifacts

    with tempfile.TemporaryDirectory() as folder:
        try:
            location = _artifact_location(client, source)
        except mlflow_errors() as error:
            raise UserError(f"{source} is not available from {server_name(uri)} ({brief(error)})") from error
        try:
            path = mlflow.artifacts.download_artifacts(
                f"{location.rstrip('/')}/{WEIGHTS}", dst_path=folder, tracking_uri=uri
            )
        except mlflow_errors() as error:
            raise UserError(
                f"{source} in {server_name(uri)} has no readable {WEIGHTS} ({brief(error)}); give the run's folder"
                " instead"
            ) from error
        yield Path(path)


def _artifact_location(client: MlflowClient, source: str) -> str:
    """URI of the folder with the generator's files."""
    if not source.startswith("models:/"):
        return _location_of_run(client, source.removeprefix("runs:/").strip("/"))
    name, slash, version = source.removeprefix("models:/").partition("/")
    if not slash:
        name, at, alias = name.rpartition("@")
        if not at:
            raise UserError(f"{source}: which version? Give {source}@champion or {source}/1")
        return str(client.get_model_version_by_alias(name, alias).source)
    if version == "latest":
        latest = max(client.get_registered_model(name).latest_versions, key=lambda v: int(v.version), default=None)
        if latest is None:
            raise UserError(f"{source}: the model has no versions")
        return str(latest.source)
    return str(client.get_model_version(name, version).source)


def _location_of_run(client: MlflowClient, run_id: str) -> str:
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    if not models:
        raise UserError(f"run {run_id} has no generator in MLflow: its training has not ended")
    latest = max((client.get_logged_model(m.model_id) for m in models), key=lambda m: m.creation_timestamp)
    return str(latest.artifact_location)
