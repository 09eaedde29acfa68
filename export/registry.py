"""An exported generator in MLflow: logged with its run, registered as a version, and champion if it is the best."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.generator import metadata
from infer.command import say
from trainer.server import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"

_FILE_TAG = "onnx_sha256"

# Two values compare only if all of these agree.
_PROTOCOL = ("metric", "metric_weights_sha256", "dataset_digest")


def register(uri: str, run_id: str, name: str, onnx_path: Path, info: Mapping[str, Any]) -> str:
    """Log the ONNX file (with ``card.md`` and ``samples.png`` beside it, if they are there) as the run's model
    "generator" and register it as the next version of ``name``, which ``models:/<name>/latest`` then means.

    Registering the same file of the same run again changes nothing, also after a try that was cut off.

    The alias ``champion`` moves to it if there is none yet, or if its metric is lower than the champion's, measured
    in the same way on the same data.

    Args:
        uri: tracking server and registry, see ``trainer.server.resolve_uri``.
        info: the generator's origin, as ``trainer.checkpoint.load_generator`` gives it.

    Returns:
        The version, such as "3".

    Raises:
        MlflowException, SQLAlchemyError, OSError: MLflow or its artifact store does not answer or refuses.
    """
    client = connect(uri)
    tags = _tags(info) | {_FILE_TAG: hashlib.sha256(onnx_path.read_bytes()).hexdigest()}
    model_id, location = _log_model(client, run_id, onnx_path, info, tags)
    version = _create_version(client, run_id, name, model_id, location, info, tags)
    _crown(client, version)
    return str(version.version)


def _tags(info: Mapping[str, Any]) -> dict[str, str]:
    tags = metadata(info)
    tags.pop("run_id", None)
    metric = info.get("metric") or {}
    if "weights_sha256" in metric:
        tags["metric_weights_sha256"] = metric["weights_sha256"]
    return tags


def _log_model(
    client: MlflowClient, run_id: str, onnx_path: Path, info: Mapping[str, Any], tags: dict[str, str]
) -> tuple[str, str]:
    """Its id and where its files are. ``mlflow.onnx.log_model`` would do this for the fluent API's active run only."""
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    file = onnx.load(onnx_path)
    properties = {entry.key: entry.value for entry in file.metadata_props}
    z_dim, size = int(properties["z_dim"]), int(properties["size"])
    run = client.get_run(run_id)
    known = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run_id}' AND tags.{_FILE_TAG} = '{tags[_FILE_TAG]}'"
    )
    logged = (known and known[0]) or client.create_logged_model(
        run.info.experiment_id,
        name="generator",
        source_run_id=run_id,
        tags=tags,
        params=properties,
        model_type="onnx",
    )
    float32 = np.dtype("float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "generator")
        mlflow.onnx.save_model(
            file,
            folder,
            mlflow_model=Model(run_id=run_id, model_id=logged.model_id, artifact_path=logged.artifact_location),
            signature=ModelSignature(
                Schema([TensorSpec(float32, (-1, z_dim), "z")]),
                Schema([TensorSpec(float32, (-1, 3, size, size), "image")]),
            ),
            pip_requirements=["numpy", "onnx", "onnxruntime>=1.14"],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
        shutil.copyfile(onnx_path, folder / "model.onnx")  # byte for byte the file that was checked
        for companion in ("card.md", "samples.png"):
            if (path := onnx_path.with_name(companion)).is_file():
                shutil.copyfile(path, folder / companion)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    if all(output.model_id != logged.model_id for output in (run.outputs and run.outputs.model_outputs) or ()):
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=int(info["kimg"]))])
    return logged.model_id, logged.artifact_location


def _create_version(
    client: MlflowClient,
    run_id: str,
    name: str,
    model_id: str,
    location: str,
    info: Mapping[str, Any],
    tags: dict[str, str],
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Generators of cat faces, one ONNX file each; see catinfer.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    metric = info.get("metric")
    quality = f", {metric['name']} {metric['value']:.2f}" if metric else ""
    # The files' location rather than models:/<model_id>: an SQL registry would look that id up in whatever store the
    # process defaults to, not in this client's (the TODO in mlflow/store/model_registry/sqlalchemy_store.py).
    known = client.search_model_versions(f"name = '{name}' and tags.{_FILE_TAG} = '{tags[_FILE_TAG]}'")
    version = next((v for v in known if v.run_id == run_id), None) or client.create_model_version(
        name,
        location,
        run_id=run_id,
        model_id=model_id,
        tags=tags,
        description=f"{info['recipe']} at {info['kimg']:g} kimg{quality}",
    )
    # What links the run's model to this version in the UI.
    link = json.dumps([{"name": version.name, "version": version.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return version


def _crown(client: MlflowClient, version: ModelVersion) -> None:
    """Every metric that can choose a best generator is a distance: lower is better."""
    name, tags = version.name, version.tags
    if "metric_value" not in tags:
        return
    alias = client.get_registered_model(name).aliases.get(CHAMPION)
    if alias is not None:
        champion = client.get_model_version(name, alias)
        if any(champion.tags.get(key) != tags.get(key) for key in _PROTOCOL):
            say(
                f"models:/{name}@{CHAMPION} stays version {alias}, which was measured otherwise or on other data; to"
                " compare, train under another --track.model, or move the alias by hand"
            )
            return
        if float(tags["metric_value"]) >= float(champion.tags["metric_value"]):
            return
    client.set_registered_model_alias(name, CHAMPION, version.version)
