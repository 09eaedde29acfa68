"""The tracker against a real SQLite store; one database serves the whole module, since making one takes seconds."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from infer.command import UserError
from trainer.data.manifest import Manifest, Shard, Split
from trainer.tracking import Tracker, _code_version, connect, end_run, open_run, resolve_uri

CONFIG: dict[str, Any] = {
    "recipe": "tiny",
    "kimg": 1.5,
    "augment": {"policy": ("colour", "cutout"), "p": {"start": 0.0, "end": 0.5}},
    "track": {"uri": "http://me:secret@host:5000"},
    "long": "x" * 7000,
    "many": {f"value_{i}": i for i in range(150)},
}
MANIFEST = Manifest(
    root="/data/cats64",
    size=64,
    splits={"train": Split((Shard("train-000000.tar", 90, "ab" * 32, 1),)), "val": Split(())},
    seed=0,
    source=("cats.zip",),
    options={},
    tool="test",
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri(None, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    open_run(uri, "warm-up", "warm-up", config={"recipe": "none"}, manifest=MANIFEST)
    return connect(uri)


@pytest.fixture
def run_id(client: MlflowClient, uri: str) -> str:
    return open_run(uri, "catgan", "first", config=CONFIG, manifest=MANIFEST)


@pytest.fixture
def tracker(uri: str, run_id: str, tmp_path: Path) -> Iterator[Tracker]:
    tracker = Tracker(tmp_path, uri, run_id)
    yield tracker
    tracker.close()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_new_run_is_described(client: MlflowClient, run_id: str, uri: str) -> None:
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("first", "RUNNING")
    params = run.data.params
    assert params["kimg"] == "1.5"
    assert params["augment.policy"] == "colour cutout"
    assert params["augment.p.end"] == "0.5"
    assert params["many.value_149"] == "149"
    assert params["track.uri"] == "http://host:5000"
    assert params["long"] == "x" * 6000
    assert run.data.tags["recipe"] == "tiny"
    assert "catgan.version" in run.data.tags
    experiment = client.get_experiment_by_name("catgan")
    assert experiment is not None
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert Path(experiment.artifact_location) == folder / "mlartifacts"


def test_the_data_set_is_the_runs_input(client: MlflowClient, run_id: str) -> None:
    (data,) = client.get_run(run_id).inputs.dataset_inputs
    assert data.dataset.name == "cats64"
    assert data.dataset.digest == MANIFEST.digest[:36]
    assert json.loads(data.dataset.source) == {"uri": "/data/cats64"}
    profile = json.loads(data.dataset.profile)
    assert profile["train_images"] == 90
    assert profile["val_images"] == 0
    assert profile["digest"] == MANIFEST.digest
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}


def test_scalars_reach_the_file_at_once_and_mlflow_by_close(
    client: MlflowClient, tracker: Tracker, run_id: str, tmp_path: Path
) -> None:
    tracker.log_scalars({"loss/generator": 2.0, "fid2k": 90.5}, 2048)
    tracker.log_scalars({"loss/generator": 1.0, "lost": float("nan")}, 4096)
    assert records(tmp_path) == [
        {"nimg": 2048, "kimg": 2.048, "loss/generator": 2.0, "fid2k": 90.5},
        {"nimg": 4096, "kimg": 4.096, "loss/generator": 1.0, "lost": None},
    ]
    tracker.close("FINISHED")
    history = client.get_metric_history(run_id, "loss/generator")
    assert [(m.step, m.value) for m in history] == [(2, 2.0), (4, 1.0)]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "fid2k")] == [(2, 90.5)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_points_that_share_a_kimg_are_all_kept(client: MlflowClient, tracker: Tracker, run_id: str) -> None:
    for nimg in (100, 200, 300):
        tracker.log_scalars({"loss/generator": float(nimg)}, nimg)
    tracker.close()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss/generator")] == [
        (0, 100.0),
        (0, 200.0),
        (0, 300.0),
    ]


def test_grids_are_images_and_artifacts(client: MlflowClient, tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    for nimg in (2000, 4000):
        path = tmp_path / f"fakes_{nimg // 1000:06d}kimg.png"
        image = Image.new("RGB", (16, 16), (nimg % 255, 0, 0))
        image.save(path)
        tracker.log_grid("fakes", image, nimg, path)
    (tmp_path / "config.json").write_text("{}")
    tracker.log_artifact(tmp_path / "config.json")
    tracker.close()

    images = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    assert len(images) == 4, images  # a picture and its thumbnail each; anything else would hide them all in the UI
    assert {name.split("+timestamp")[0] for name in images} == {"fakes+step+2", "fakes+step+4"}
    samples = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert samples == ["samples/fakes_000002kimg.png", "samples/fakes_000004kimg.png"]
    downloaded = client.download_artifacts(run_id, samples[0], str(tmp_path / "samples"))
    assert Path(downloaded).read_bytes() == (tmp_path / "fakes_000002kimg.png").read_bytes()
    assert "config.json" in [file.path for file in client.list_artifacts(run_id)]


def test_rewind_drops_what_lies_beyond_and_a_torn_line(tracker: Tracker, tmp_path: Path) -> None:
    tracker.rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    for nimg in (1000, 2000, 3000):
        tracker.log_scalars({"x": 1.0}, nimg)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"nimg": 2000, "ki')
    tracker.rewind(2000)
    tracker.log_scalars({"x": 2.0}, 3000)
    assert [(r["nimg"], r["x"]) for r in records(tmp_path)] == [(1000, 1.0), (2000, 1.0), (3000, 2.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_reopened_run_goes_on(client: MlflowClient, uri: str, run_id: str, tmp_path: Path) -> None:
    first = Tracker(tmp_path, uri, run_id)
    first.log_scalars({"x": 1.0}, 1000)
    first.close("FAILED")
    again = open_run(
        uri,
        "catgan",
        "ignored",
        config=CONFIG | {"kimg": 3.0, "new": 1},
        manifest=MANIFEST,
        run_id=run_id,
    )
    assert again == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "first")
    assert run.data.params["kimg"] == "1.5"
    assert run.data.tags["resumed.kimg"] == "3.0"
    assert [key for key in run.data.tags if key.startswith("resumed.")] == ["resumed.kimg"]
    assert run.data.params["new"] == "1"
    assert len(run.inputs.dataset_inputs) == 1
    second = Tracker(tmp_path, uri, run_id)
    second.log_scalars({"x": 2.0}, 2000)
    second.close()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "x")] == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id).info.status == "RUNNING"
    end_run(uri, run_id, "KILLED")
    assert client.get_run(run_id).info.status == "KILLED"


def test_an_unknown_run_is_the_users_mistake(client: MlflowClient, uri: str) -> None:
    with pytest.raises(UserError, match=r"has no run 0123.*--track\.uri"):
        open_run(uri, "catgan", "x", config=CONFIG, manifest=MANIFEST, run_id="0123")


def test_a_deleted_run_is_the_users_mistake(client: MlflowClient, uri: str, run_id: str) -> None:
    client.delete_run(run_id)
    with pytest.raises(UserError, match="mlflow runs restore"):
        open_run(uri, "catgan", "x", config=CONFIG, manifest=MANIFEST, run_id=run_id)


def test_a_dead_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = closed.getsockname()[1]
        with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port} .*refused.*--track\.uri") as caught:
            open_run(f"http://me:secret@127.0.0.1:{port}", "x", "x", config=CONFIG, manifest=MANIFEST)
    assert "secret" not in str(caught.value)


def test_retries_are_bounded(client: MlflowClient) -> None:
    """MLflow alone would try for minutes."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() <= 3
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() <= 30


def test_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = resolve_uri(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path)
    with pytest.raises(UserError, match="cannot write the MLflow database"):
        open_run(uri, "x", "x", config=CONFIG, manifest=MANIFEST)


def test_a_worker_without_the_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not on this machine"):
        Tracker(tmp_path, f"sqlite:///{tmp_path}/elsewhere.db", "0123")
    assert not (tmp_path / "elsewhere.db").exists()


def test_which_uri_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert resolve_uri("sqlite:///mine.db", Path("out")) == f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri(None, Path("out")) == "http://127.0.0.1:5000"
    assert resolve_uri("sqlite:////mine.db", Path("out")) == "sqlite:////mine.db"
    for dead in ("file:./mlruns", "./mlruns", "mlruns"):
        with pytest.raises(UserError, match="file store"):
            resolve_uri(dead, Path("out"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_is_the_checkouts_own(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert "git.dirty" not in _code_version(tmp_path)
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    tags = _code_version(tmp_path)
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "inner" / "file").write_text("2")
    assert _code_version(tmp_path)["git.dirty"] == "true"
    # Installed below somebody else's repository, its commit says nothing about this code.
    assert "mlflow.source.git.commit" not in _code_version(tmp_path / "inner")
