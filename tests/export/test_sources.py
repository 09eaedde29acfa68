"""``catexport`` of a real training: from its folder, a checkpoint and MLflow; evaluated, registered, as a page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from mlflow.tracking import MlflowClient

from catgan.command import UserError
from export.cli import main
from infer.latents import latents
from infer.session import Generator
from trainer.tracking.server import connect

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON object of a finished training."""
    command = [
        *(sys.executable, str(ROOT / "trainer" / "run.py"), "dcgan-cpu", "--data", str(shards), "--name", "a"),
        *("--out", str(tmp_path_factory.mktemp("runs")), "--workers", "0", "--batch", "8", "--kimg", "0.128"),
        *("--model.g-width", "8", "--model.d-width", "8", "--eval.extractor", "efflite0", "--eval.num", "48"),
        *("--track.tick-kimg", "0.064", "--track.snapshot-kimg", "0.128"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def uri(trained: dict[str, Any]) -> str:
    return f"sqlite:///{Path(trained['run_dir']).parent / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return connect(uri)


def entries(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def images(path: Path) -> np.ndarray:
    generator = Generator(path, "cpu")
    return generator(latents(range(4), generator.z_dim))


def test_each_source_gives_the_same_generator(trained: dict[str, Any], uri: str, tmp_path: Path) -> None:
    run, run_id = Path(trained["run_dir"]), trained["mlflow_run_id"]
    expected = images(Path(trained["onnx"]))
    assert expected.std() > 1
    (checkpoint,) = run.glob("checkpoint_*")
    in_mlflow = [run_id, f"runs:/{run_id}", "models:/catgan@champion", "models:/catgan/1", "models:/catgan/latest"]
    for source in (str(run), str(checkpoint), *in_mlflow):
        target = tmp_path / "gen.onnx"
        main([source, "-o", str(target), "--data", "none", "--tracking-uri", uri])
        np.testing.assert_array_equal(images(target), expected, err_msg=source)
        assert entries(target)["run_id"] == run_id
        target.unlink()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f" * 32, "is not available from MLflow"),
        ("models:/dogs@champion", "is not available from MLflow"),
        ("models:/catgan@best", "is not available from MLflow"),
        ("models:/catgan/7", "is not available from MLflow"),
        ("models:/dogs/latest", "is not available from MLflow"),
        ("models:/catgan", "which version"),
    ],
)
def test_sources_that_mlflow_does_not_have(source: str, expected: str, uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        main([source, "-o", str(tmp_path / "gen.onnx"), "--tracking-uri", uri])
    assert list(tmp_path.iterdir()) == []


def test_the_exported_file_has_the_metric_of_the_training(trained: dict[str, Any], tmp_path: Path) -> None:
    """The data are found by config.json."""
    target = tmp_path / "gen.onnx"
    main([trained["run_dir"], "-o", str(target)])
    value = trained["metric"]["value"]
    metadata = entries(target)
    assert metadata["onnx_metric"] == metadata["metric"] == "fd48_efflite0"
    assert float(metadata["onnx_metric_value"]) == pytest.approx(value, rel=1e-3)


def test_a_variant_is_evaluated_and_registered_beside_the_champion(
    trained: dict[str, Any], client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    target = tmp_path / "gen.onnx"
    argv = [trained["run_dir"], "-o", str(target), "--precision", "fp16", "--tracking-uri", uri]
    with pytest.raises(UserError, match="was not evaluated"):
        main([*argv, "--data", "none", "--register", "catgan"])
    assert list(tmp_path.iterdir()) == []
    made = main([*argv, "--register", "catgan"])
    (version,) = made["versions"]
    registered = client.get_model_version("catgan", version)
    assert registered.tags["precision"] == "fp16"
    assert registered.run_id == trained["mlflow_run_id"]
    assert "variant" in registered.tags["champion"]
    assert client.get_model_version_by_alias("catgan", "champion").version != version
    assert made["files"][0]["metric"]["name"] == "fd48_efflite0"


def test_a_model_name_that_mlflow_refuses(trained: dict[str, Any], uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--register 'cats/1': MLflow takes"):
        main([trained["run_dir"], "-o", str(tmp_path / "gen.onnx"), "--register", "cats/1", "--tracking-uri", uri])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs the system package npm")
def test_a_run_becomes_a_page(trained: dict[str, Any], tmp_path: Path) -> None:
    made = main(
        [trained["run_dir"], "-o", str(tmp_path / "gen.onnx"), "--data", "none", "--web", str(tmp_path / "web")]
    )
    assert made["web"] == str(tmp_path / "web")
    assert (tmp_path / "web" / "index.html").is_file()
    (model,) = (tmp_path / "web").rglob("*.onnx")
    np.testing.assert_array_equal(images(model), images(tmp_path / "gen.onnx"))
