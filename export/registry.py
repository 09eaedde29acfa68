"""An exported generator in MLflow: logged with its run, registered as a version, and champion if it is the best."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from catgan.command import say
from export import champion
from export.generator import metadata
from trainer.tracking.server import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"

_FILE_TAG = "onnx_sha256"
_COMPANIONS = ("card.md", "samples.png", "gen.safetensors")
_FROM_FILE = ("precision", "onnx_metric", "onnx_metric_value", "weights_sha256")
_DESCRIPTION_LENGTH = 5000  # MLflow's limit


def register(uri: str, run_id: str, name: str, onnx_path: Path, info: Mapping[str, Any]) -> str:
    """Log the ONNX file (with ``card.md``, ``samples.png`` and ``gen.safetensors`` beside it, if they are there) as the
    run's model "generator" and register it as the next version of ``name``, which ``models:/<name>/latest`` then means.

    Registering the same file of the same run again changes nothing, also after a try that was cut off.

    The alias ``champion`` moves to it if there is none yet, or if its metric is better by more than noise, measured in
    the same way on the same data: see ``export.champion.decide``. The decision is said and kept in the version's tags.

    Args:
        uri: tracking server and registry, see ``trainer.tracking.server.resolve_uri``.
        info: the generator's origin, as ``trainer.checkpoints.checkpoint.load_generator`` gives it.

    Returns:
        The version, such as "3".

    Raises:
        MlflowException, SQLAlchemyError, OSError: MLflow or its artifact store does not answer or refuses.
    """
    client = connect(uri)
    tags = _tags(info, onnx_path) | {_FILE_TAG: hashlib.sha256(onnx_path.read_bytes()).hexdigest()}
    model_id, location = _log_model(client, run_id, onnx_path, info, tags)
    version = _create_version(client, run_id, name, model_id, location, onnx_path, info, tags)
    _crown(client, version)
    return str(version.version)


def _tags(info: Mapping[str, Any], onnx_path: Path) -> dict[str, str]:
    properties = {entry.key: entry.value for entry in onnx.load(onnx_path, load_external_data=False).metadata_props}
    tags = metadata(info) | {key: properties[key] for key in _FROM_FILE if key in properties}
    tags.pop("run_id", None)
    return tags | champion.tags_of(info.get("metric") or {})


def _log_model(
    client: MlflowClient, run_id: str, onnx_path: Path, info: Mapping[str, Any], tags: dict[str, str]
) -> tuple[str, str]:
    """Its id and where its files are. ``mlflow.onnx.log_model`` would do this for the fluent API's active run only."""
    import mlflow.onnx
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    file = onnx.load(onnx_path)
    properties = {entry.key: entry.value for entry in file.metadata_props}
    z_dim = int(properties["z_dim"])
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
                Schema([_image_spec(file)]),
            ),
            pip_requirements=["numpy", "onnx", "onnxruntime>=1.15"],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
        shutil.copyfile(onnx_path, folder / "model.onnx")  # byte for byte the file that was checked
        for companion in _COMPANIONS:
            if (path := onnx_path.with_name(companion)).is_file():
                shutil.copyfile(path, folder / companion)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    if all(output.model_id != logged.model_id for output in (run.outputs and run.outputs.model_outputs) or ()):
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=int(info["kimg"]))])
    return logged.model_id, logged.artifact_location


def _image_spec(file: onnx.ModelProto) -> Any:
    import numpy as np
    from mlflow.types import TensorSpec

    kind = file.graph.output[0].type.tensor_type
    shape = tuple(d.dim_value or -1 for d in kind.shape.dim)
    return TensorSpec(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape, "image")


def _create_version(
    client: MlflowClient,
    run_id: str,
    name: str,
    model_id: str,
    location: str,
    onnx_path: Path,
    info: Mapping[str, Any],
    tags: dict[str, str],
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Generators of cat faces, one ONNX file each; see catinfer.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The files' location rather than models:/<model_id>: an SQL registry would look that id up in whatever store the
    # process defaults to, not in this client's (the TODO in mlflow/store/model_registry/sqlalchemy_store.py).
    known = client.search_model_versions(f"name = '{name}' and tags.{_FILE_TAG} = '{tags[_FILE_TAG]}'")
    version = next((v for v in known if v.run_id == run_id), None) or client.create_model_version(
        name,
        location,
        run_id=run_id,
        model_id=model_id,
        tags=tags,
        description=_description(info, onnx_path),
    )
    # What links the run's model to this version in the UI.
    link = json.dumps([{"name": version.name, "version": version.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return version


def _description(info: Mapping[str, Any], onnx_path: Path) -> str:
    """One line, then the card without its picture, which the UI could not show."""
    metric = info.get("metric")
    quality = f", {metric['name']} {metric['value']:.2f}" if metric else ""
    text = f"{info['recipe']} at {info['kimg']:g} kimg{quality}"
    card = onnx_path.with_name("card.md")
    if card.is_file():
        lines = [line for line in card.read_text(encoding="utf-8").splitlines() if not line.startswith("![")]
        text += "\n\n" + "\n".join(lines)
    return text if len(text) <= _DESCRIPTION_LENGTH else text[:_DESCRIPTION_LENGTH].rpartition("\n")[0]


def _crown(client: MlflowClient, version: ModelVersion) -> None:
    name = version.name
    alias = client.get_registered_model(name).aliases.get(CHAMPION)
    if alias is not None and int(alias) == int(version.version):
        return
    old = None if alias is None else client.get_model_version(name, alias)
    moves, reason = champion.decide(version.tags, old.tags if old else None)
    to = f"moves to version {version.version}" if moves else "stays version " + str(alias) if old else "stays unset"
    say(f"models:/{name}@{CHAMPION} {to}: {reason}")
    client.set_model_version_tag(name, version.version, CHAMPION, f"{to}: {reason}")
    if moves:
        client.set_registered_model_alias(name, CHAMPION, version.version)
