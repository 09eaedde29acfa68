"""Where ``catexport`` finds a generator: on this machine, or in MLflow."""

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

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from trainer.models import Generator

WEIGHTS = "gen.safetensors"

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def is_in_mlflow(source: str) -> bool:
    """Whether ``source`` names a run or a registered model rather than a file."""
    return source.startswith(("runs:/", "models:/")) or (
        _RUN_ID.fullmatch(source) is not None and not Path(source).exists()
    )


def is_in_bucket(source: str) -> bool:
    """Whether ``source`` is a URL, such as s3://bucket/runs/mine."""
    return "://" in source


@dataclass(frozen=True)
class Source:
    """A trained generator, and where it comes from."""

    generator: Generator
    info: dict[str, Any]
    """As ``trainer.checkpoints.checkpoint.load_generator`` gives it."""
    weights: bytes | None = None
    """The gen.safetensors that it was read from; None for a checkpoint."""
    data: str | None = None
    """Where the data lay that it was trained on, if that is known."""


def open_source(source: str, uri: str | None) -> Source:
    """The generator that ``source`` names.

    Args:
        source: a path (see ``load_generator``); the URL of a run in a bucket; a run of MLflow, by its id
            with or without ``runs:/``; ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        uri: MLflow's tracking server and registry, for what is there.

    Raises:
        UserError: nothing of the kind there, or MLflow does not answer.
    """
    if is_in_bucket(source):
        return _load(_pulled(source))
    if not is_in_mlflow(source):
        return _load(Path(source))
    assert uri is not None
    with _downloaded(source, uri) as path:
        return _load(path)


def _pulled(location: str) -> Path:
    """The files of a run in a bucket, its checkpoints excepted, on this machine."""
    from trainer.checkpoints.storage import open_storage

    storage = open_storage(location)
    try:
        storage.pull()
    except OSError as error:
        raise UserError(f"{location}: cannot be read ({error.strerror or error})") from error
    return storage.work


def _load(path: Path) -> Source:
    from trainer.checkpoints.checkpoint import load_generator

    generator, info = load_generator(path)
    released = (path, path / WEIGHTS, path / "best" / WEIGHTS)  # in the order of load_generator
    file = next((p for p in released if p.suffix == ".safetensors" and p.is_file()), None)
    return Source(generator, info, file.read_bytes() if file else None, _recorded_data(path))


def _recorded_data(path: Path) -> str | None:
    """What the ``config.json`` of the run that ``path`` is or lies in says."""
    path = path.resolve()
    for folder in (path, *list(path.parents)[:2]):
        try:
            recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        data = recorded.get("data")
        return data if isinstance(data, str) else None
    return None


@contextmanager
def _downloaded(source: str, uri: str) -> Iterator[Path]:
    from trainer.tracking.outbox import brief, redact
    from trainer.tracking.server import connect

    client = connect(uri)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    failures = (MlflowException, SQLAlchemyError, RequestException, OSError)
    with tempfile.TemporaryDirectory() as folder:
        try:
            location = _location(client, source)
        except failures as error:
            raise UserError(f"{source}: MLflow at {redact(uri)} does not give it ({brief(error)})") from error
        try:
            path = mlflow.artifacts.download_artifacts(
                f"{location.rstrip('/')}/{WEIGHTS}", dst_path=folder, tracking_uri=uri
            )
        except failures as error:
            raise UserError(
                f"{source} in MLflow at {redact(uri)} has no {WEIGHTS} that can be read ({brief(error)}); give the"
                " run's folder instead"
            ) from error
        yield Path(path)


def _location(client: MlflowClient, source: str) -> str:
    """Where the files of the generator lie."""
    if not source.startswith("models:/"):
        return _of_run(client, source.removeprefix("runs:/").strip("/"))
    name, at, alias = source.removeprefix("models:/").partition("@")
    if at:
        return str(client.get_model_version_by_alias(name, alias).source)
    name, slash, version = name.partition("/")
    if not slash:
        raise UserError(f"{source}: say which one, {source}@champion or {source}/1")
    if version == "latest":
        newest = max(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version), default=None)
        if newest is None:
            raise UserError(f"{source}: no such model")
        return str(newest.source)
    return str(client.get_model_version(name, version).source)


def _of_run(client: MlflowClient, run_id: str) -> str:
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    if not models:
        raise UserError(f"run {run_id} has no generator in MLflow: its training has not ended")
    newest = max((client.get_logged_model(m.model_id) for m in models), key=lambda m: m.creation_timestamp)
    return str(newest.artifact_location)
