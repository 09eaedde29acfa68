from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlflow
import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from torch import nn

from export import registry
from export.card import write_card
from export.generator import export_onnx, metadata
from export.registry import register
from export.source import _artifact_location
from trainer.config import ModelConfig
from trainer.models import build_generator
from trainer.tracking.server import connect, resolve_uri

pytestmark = pytest.mark.slow

INFO: dict[str, Any] = {
    "recipe": "dcgan-8",
    "kimg": 12.0,
    "metric": {"name": "fid2k", "value": 50.0, "weights_sha256": "feed", "n_fake": 2048},
    "run_id": "not that of the version",
    "dataset_digest": "dada",
}


def info(value: float, **changes: Any) -> dict[str, Any]:
    metric = INFO["metric"] | {"value": value} | {k: v for k, v in changes.items() if k in INFO["metric"]}
    return INFO | {"metric": metric} | {k: v for k, v in changes.items() if k in INFO}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri(f"sqlite:///{tmp_path_factory.mktemp('out') / 'mlflow.db'}", Path("unused"))


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    client = connect(uri)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    client.create_experiment("catgan", artifact_location=str(folder / "mlartifacts"))
    return client


def new_run(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("catgan")
    assert experiment is not None
    return client.create_run(experiment.experiment_id).info.run_id


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return new_run(client)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "gen.onnx"
    generator: nn.Module = build_generator(ModelConfig(size=8, z_dim=4, g_width=4))
    export_onnx(generator, path, metadata(INFO))
    write_card(path, INFO, 0.0)
    return path


def test_a_version_is_linked_to_its_run(
    client: MlflowClient, uri: str, run_id: str, onnx_path: Path, tmp_path: Path
) -> None:
    before = os.environ.get("MLFLOW_TRACKING_URI")
    assert register(uri, run_id, "linked", onnx_path, INFO) == "1"
    version = client.get_model_version("linked", "1")
    assert version.run_id == run_id
    assert version.description.startswith("dcgan-8 at 12 kimg, fid2k 50.00\n\n# Cat generator")
    assert version.tags.pop("champion") == "moves to version 1: there was no champion"
    assert len(version.tags.pop("weights_sha256")) == 64
    assert version.tags == {
        "size": "8",
        "precision": "fp32",
        "recipe": "dcgan-8",
        "kimg": "12",
        "metric": "fid2k",
        "metric_value": "50.0",
        "metric_n_fake": "2048",
        "metric_weights_sha256": "feed",
        "dataset_digest": "dada",
        "onnx_sha256": hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
    }
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    assert output.step == 12
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.source_run_id, str(model.status)) == ("generator", run_id, "READY")
    assert model.tags["mlflow.modelVersions"] == '[{"name": "linked", "version": 1}]'
    assert mlflow.active_run() is None
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


def test_models_are_found_by_their_metric_and_the_run_has_each_point_once(
    client: MlflowClient, uri: str, onnx_path: Path
) -> None:
    experiment = client.get_experiment_by_name("catgan")
    assert experiment is not None
    runs = {}
    for value in (70.0, 20.5, 40.0):
        run_id = new_run(client)
        runs[value] = run_id
        client.log_inputs(run_id, [DatasetInput(Dataset("cats", "dada", "webdataset", "{}"))])
        client.log_metric(run_id, "fid3k", value, timestamp=1000, step=12)
        for _ in range(2):
            register(uri, run_id, "sorted", onnx_path, info(value, name="fid3k"))
        assert [(p.timestamp, p.value) for p in client.get_metric_history(run_id, "fid3k")] == [(1000, value)]
    found = client.search_logged_models(
        [experiment.experiment_id],
        "metrics.fid3k < 50",
        order_by=[{"field_name": "metrics.fid3k", "ascending": True}],
    )
    assert [model.source_run_id for model in found] == [runs[20.5], runs[40.0]]
    (metric,) = found[0].metrics
    assert (metric.key, metric.value, metric.step) == ("fid3k", 20.5, 12)
    assert (metric.dataset_name, metric.dataset_digest) == ("cats", "dada")


def test_the_downloaded_file_is_the_checked_one(
    client: MlflowClient, uri: str, run_id: str, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(uri, run_id, "downloaded", onnx_path, INFO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/downloaded/latest", dst_path=str(tmp_path)))
    assert (folder / "model.onnx").read_bytes() == onnx_path.read_bytes()
    assert (folder / "card.md").read_text() == onnx_path.with_name("card.md").read_text()
    assert (folder / "samples.png").is_file()
    served = mlflow.pyfunc.load_model(str(folder))
    assert served.predict({"z": np.zeros((3, 4), np.float32)})["image"].shape == (3, 3, 8, 8)


def champion(client: MlflowClient, name: str) -> str | None:
    alias = client.get_registered_model(name).aliases.get("champion")
    return None if alias is None else str(alias)


def test_the_champion_moves_to_better_versions_only(
    client: MlflowClient, uri: str, onnx_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    champions = []
    for entry in (
        INFO | {"metric": None},  # 1: not evaluated, so no champion
        info(50.0),  # 2: the first
        info(60.0),  # 3: worse
        info(50.0),  # 4: equal
        info(9.5),  # 5: better; as text it would be worse
    ):
        register(uri, new_run(client), "contest", onnx_path, entry)
        champions.append(champion(client, "contest"))
    assert champions == [None, "2", "2", "2", "5"]
    assert "moves to version 5: fid2k 9.5 against 50: better by more than noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [{"name": "kid2k"}, {"dataset_digest": "beef"}, {"weights_sha256": "f00d"}, {"n_fake": 2999}]
)
def test_a_version_that_cannot_be_compared_does_not_move_the_champion(
    client: MlflowClient,
    uri: str,
    onnx_path: Path,
    other: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "protocol-" + "-".join(other)
    register(uri, new_run(client), name, onnx_path, info(50.0))
    register(uri, new_run(client), name, onnx_path, info(1.0, **other))
    assert champion(client, name) == "1"
    assert "stays version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["log_model_artifacts", "log_outputs", "create_model_version", "set_registered_model_alias"]
)
def test_an_interrupted_registration_is_completed_once(
    client: MlflowClient, uri: str, run_id: str, onnx_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("interrupted")

    name = f"interrupted-{method}"
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, method, fail)
        with pytest.raises(ConnectionError):
            register(uri, run_id, name, onnx_path, INFO)
    for _ in range(2):
        assert register(uri, run_id, name, onnx_path, INFO) == "1"
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert str(model.status) == "READY"
    assert len(client.search_logged_models([model.experiment_id], f"source_run_id = '{run_id}'")) == 1
    assert champion(client, name) == "1"


def test_names_with_quotes_and_other_characters(client: MlflowClient, uri: str, onnx_path: Path) -> None:
    name = """my 'best' "cats" @home 50%"""
    first = new_run(client)
    assert [register(uri, run_id, name, onnx_path, INFO) for run_id in (first, new_run(client), first)] == [
        "1",
        "2",
        "1",
    ]
    assert champion(client, name) == "1"
    for source, version in ((f"models:/{name}/latest", "2"), (f"models:/{name}@champion", "1")):
        assert _artifact_location(client, source) == client.get_model_version(name, version).source


def test_a_run_that_does_not_exist(client: MlflowClient, uri: str, onnx_path: Path) -> None:
    with pytest.raises(MlflowException, match="0123"):
        register(uri, "0123", "nobody", onnx_path, INFO)


def test_a_champion_that_another_training_moves_meanwhile_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 3, which was registered while version 2 was deciding against version 1, is better."""
    distances, seen = {"1": 100, "2": 80, "3": 50}, iter(["1", "3", "3"])

    class Client:
        moved: ClassVar[list[str]] = []

        def get_registered_model(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(aliases={"champion": next(seen)})

        def get_model_version(self, name: str, version: str) -> SimpleNamespace:
            return SimpleNamespace(version=version, tags={"d": distances[version]})

        def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
            self.moved.append(version)

        def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
            pass

    monkeypatch.setattr(registry.champion, "decide", lambda new, old: (new["d"] < old["d"], "by distance"))
    version: Any = SimpleNamespace(name="cats", version="2", tags={"d": 80})
    registry._update_champion(Client(), version)  # type: ignore[arg-type]
    assert Client.moved == []
