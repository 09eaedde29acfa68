"""Log an exported generator with its MLflow run, register it as a version of a model, and update the champion."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import say
from export import champion
from trainer.tracking.models import link_metric, link_output
from trainer.tracking.server import connect

if TYPE_CHECKING:
    import onnx
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"

_FILE_TAG = "onnx_sha256"
_COMPANIONS = ("card.md", "samples.png", "directions.png", "gen.safetensors")
_FROM_FILE = ("size", "precision", "onnx_metric", "onnx_metric_value", "weights_sha256")
_DESCRIPTION_LENGTH = 5000  # MLflow's limit


def register(uri: str, run_id: str, name: str, onnx_path: Path, info: Mapping[str, Any]) -> str:
    """Log an ONNX file as the model "generator" of its run, and register it as the next version of ``name``.

    ``card.md``, its images and ``gen.safetensors`` in the file's folder are logged with it. Registering the same
    file of the same run again changes nothing, or completes a registration that was interrupted.

    The alias ``champion`` moves to the new version if there is no champion, or if its metric is better by more than
    noise, see ``export.champion.decide``. The decision is printed and stored as a tag of the version.

    Args:
        uri: tracking server and registry, see ``trainer.tracking.server.resolve_uri``.
        info: the generator's origin, see ``trainer.checkpoints.checkpoint.load_generator``.

    Returns:
        The version, such as "3".

    Raises:
        MlflowException, SQLAlchemyError, OSError: MLflow or its artifact store cannot be reached or refuses.
    """
    client = connect(uri)
    release = _Release.read(run_id, onnx_path, info)
    model = _log_model(client, release)
    version = _create_version(client, name, model, release)
    _update_champion(client, version)
    return str(version.version)


@dataclass(frozen=True)
class _Release:
    """A file to be registered."""

    run_id: str
    onnx_path: Path
    info: Mapping[str, Any]
    model: onnx.ModelProto
    properties: dict[str, str]
    """The file's metadata."""
    tags: dict[str, str]
    """Of the logged model and of the version."""

    @classmethod
    def read(cls, run_id: str, onnx_path: Path, info: Mapping[str, Any]) -> _Release:
        import onnx  # on use, like mlflow: it takes seconds, and every training imports this module

        from export.generator import metadata

        model = onnx.load(onnx_path, load_external_data=False)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        tags = metadata(info) | {key: properties[key] for key in _FROM_FILE if key in properties}
        tags.pop("run_id", None)
        tags |= champion.metric_tags(info.get("metric") or {})
        tags[_FILE_TAG] = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
        return cls(run_id, onnx_path, info, model, properties, tags)


def _log_model(client: MlflowClient, release: _Release) -> LoggedModel:
    """The logged model of the run, created unless it exists, with its files.

    ``mlflow.onnx.log_model`` works for the active run of the fluent API only.
    """
    run = client.get_run(release.run_id)
    existing = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{release.run_id}' AND tags.{_FILE_TAG} = '{release.tags[_FILE_TAG]}'",
    )
    logged = (existing and existing[0]) or client.create_logged_model(
        run.info.experiment_id,
        name="generator",
        source_run_id=release.run_id,
        tags=release.tags,
        params=release.properties,
        model_type="onnx",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "generator")
        _save_model(folder, logged, release)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    step = int(release.info["kimg"])
    if metric := release.info.get("metric"):
        link_metric(client, run, logged, metric, step)
    link_output(client, run, logged, step)
    return logged


def _save_model(folder: Path, logged: LoggedModel, release: _Release) -> None:
    """Write the files of an MLflow model to ``folder``."""
    import mlflow.onnx
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema

    mlflow.onnx.save_model(
        release.model,
        folder,
        mlflow_model=Model(run_id=release.run_id, model_id=logged.model_id, artifact_path=logged.artifact_location),
        signature=ModelSignature(
            Schema([_tensor_spec(value) for value in release.model.graph.input]),
            Schema([_tensor_spec(value) for value in release.model.graph.output]),
        ),
        pip_requirements=["numpy", "onnx", "onnxruntime>=1.15"],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    shutil.copyfile(release.onnx_path, folder / "model.onnx")  # MLflow writes other bytes than those that were checked
    for companion in _COMPANIONS:
        if (path := release.onnx_path.with_name(companion)).is_file():
            shutil.copyfile(path, folder / companion)


def _tensor_spec(value: onnx.ValueInfoProto) -> Any:
    import numpy as np
    from mlflow.types import TensorSpec
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.tensor_type
    shape = tuple(d.dim_value or -1 for d in kind.shape.dim)
    return TensorSpec(np.dtype(tensor_dtype_to_np_dtype(kind.elem_type)), shape, value.name)


def _create_version(client: MlflowClient, name: str, model: LoggedModel, release: _Release) -> ModelVersion:
    """The version of ``name`` for this file and run, created unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Generators of cat faces, one ONNX file each; see catinfer.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A condition on the name could not contain every name.
    existing = client.search_model_versions(f"tags.{_FILE_TAG} = '{release.tags[_FILE_TAG]}'")
    version = next((v for v in existing if (v.name, v.run_id) == (name, release.run_id)), None)
    if version is None:
        # The location instead of models:/<model_id>: an SQL registry looks that id up in the process's default store
        # instead of this client's (the TODO in mlflow/store/model_registry/sqlalchemy_store.py).
        version = client.create_model_version(
            name,
            model.artifact_location,
            run_id=release.run_id,
            model_id=model.model_id,
            tags=release.tags,
            description=_description(release),
        )
    # MLflow's page of the run links its model to this version by this tag.
    link = json.dumps([{"name": version.name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return version


def _description(release: _Release) -> str:
    """A line about the generator, then its card without the image, which MLflow's page cannot show."""
    info = release.info
    metric = info.get("metric")
    quality = f", {metric['name']} {metric['value']:.2f}" if metric else ""
    text = f"{info['recipe']} at {info['kimg']:g} kimg{quality}"
    card = release.onnx_path.with_name("card.md")
    if card.is_file():
        lines = [line for line in card.read_text(encoding="utf-8").splitlines() if not line.startswith("![")]
        text += "\n\n" + "\n".join(lines)
    return text if len(text) <= _DESCRIPTION_LENGTH else text[:_DESCRIPTION_LENGTH].rpartition("\n")[0]


def _update_champion(client: MlflowClient, version: ModelVersion) -> None:
    """Move the alias to ``version`` if it is better; print the decision and store it as a tag."""
    name = version.name
    while True:
        alias = client.get_registered_model(name).aliases.get(CHAMPION)
        if alias is not None and int(alias) == int(version.version):
            return
        old = None if alias is None else client.get_model_version(name, alias)
        moves, reason = champion.decide(version.tags, old.tags if old else None)
        if not moves or client.get_registered_model(name).aliases.get(CHAMPION) == alias:
            break  # otherwise another training has moved it while this one was deciding
    unmoved = f"stays version {alias}" if old else "stays unset"
    decision = f"moves to version {version.version}" if moves else unmoved
    say(f"models:/{name}@{CHAMPION} {decision}: {reason}")
    if moves:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    client.set_model_version_tag(name, version.version, CHAMPION, f"{decision}: {reason}")
