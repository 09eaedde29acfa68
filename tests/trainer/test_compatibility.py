"""Data sets, checkpoints, runs and outboxes that earlier versions wrote (``tests/fixtures``) can still be used."""

import shutil
from pathlib import Path

import onnx
import pytest
from mlflow.tracking import MlflowClient

from export.cli import main as catexport
from infer.cli import main as catinfer
from trainer.checkpoints import checkpoint
from trainer.cli import main as cattrain
from trainer.data.cli import main as catdata
from trainer.launch.driver import main as train

FORMAT_3 = Path(__file__).resolve().parents[1] / "fixtures" / "format3"
OPTIONS = (
    "dcgan-cpu-32 --workers 0 --loader.workers 0 --batch 8 --eval.num 16 --eval.extractor efflite0"
    " --model.size 16 --model.z-dim 4 --model.g-width 2 --model.d-width 2 --model.max-width 4"
    " --track.tick-kimg 0.032 --track.snapshot-kimg 0.064 --track.grid 4"
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished run that was trained without MLflow."""
    shutil.copytree(FORMAT_3 / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def test_data_set():
    verified = catdata(["verify", str(FORMAT_3 / "data")])
    assert (verified["ok"], verified["images"], verified["shards"]) == (True, 48, 17)


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("best", "7b81b3579f9ff2b15ab9298e218c442c7001470f2883b6cb6af9ac9a5bc25073"),
        ("checkpoint_000000000128", "bd09d12b1b429bf68f91b5bdf9c823b02c96e56cbb1d0cb34dee159ec682381b"),
    ],
)
def test_export_has_the_weights_that_the_earlier_version_exported(source: str, weights: str, tmp_path: Path):
    catexport([str(FORMAT_3 / "runs" / "old" / source), "-o", str(tmp_path / "gen.onnx")])
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "gen.onnx").metadata_props}
    assert metadata["weights_sha256"] == weights


def test_exported_file_gives_the_images_that_the_earlier_version_generated(tmp_path: Path):
    best = FORMAT_3 / "runs" / "old" / "best"
    catinfer(["--onnx", str(best / "gen.onnx"), "--n", "4", "--out", str(tmp_path / "images")])
    assert len(list((tmp_path / "images").glob("*.png"))) == 4


@pytest.mark.slow
def test_outbox_is_delivered_and_the_run_continues(runs: Path):
    uri = f"sqlite:///{runs}/mlflow.db"
    assert cattrain(["sync", str(runs / "old"), "--uri", uri])["delivered"] == 19
    data = str(FORMAT_3 / "data")
    place = ["--data", data, "--out", str(runs), "--name", "old", "--track.uri", uri]
    result = train([*OPTIONS.split(), *place, "--kimg", "0.192"])
    state = checkpoint.load(checkpoint.find_all(runs / "old")[-1])
    assert state["nimg"] == 192
    run = MlflowClient(uri).get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    steps = [point.timestamp for point in MlflowClient(uri).get_metric_history(run.info.run_id, "loss/generator")]
    assert len(steps) == 6, "a point for each tick of 32 images, each once"
