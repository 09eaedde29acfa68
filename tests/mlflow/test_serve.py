"""``mlflow/serve.sh`` starts a real server, which records a training."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from PIL import Image

from catgan.dataset import Manifest, Split
from export.generator import export_onnx
from export.registry import register
from infer.cli import main as catinfer
from trainer.config import ModelConfig
from trainer.models import build_generator
from trainer.tracking.server import artifact_location, connect, resolve_uri
from trainer.tracking.tracker import Tracker, end_run, open_run

SCRIPT = Path(__file__).resolve().parents[2] / "mlflow" / "serve.sh"
MANIFEST = Manifest("/data/cats", 8, {"train": Split(())}, 0, (), {}, "test")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "50%20 of #1, ü?" / "runs"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    port = free_port()
    log = folder.parents[1] / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [SCRIPT, str(folder), "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(uri):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield uri
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in log.read_text()
        assert log.read_text().endswith("serve.sh: stopped\n")
        assert not answers(uri)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_training_is_recorded_by_the_server(
    server: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(server)
    run_id = open_run(tmp_path, server, "catgan", config={"recipe": "tiny"}, manifest=MANIFEST, register=register)
    tracker = Tracker(tmp_path, server, register=register)
    for kimg in range(5):
        tracker.log_scalars({"loss/generator": float(kimg)}, kimg * 1000)
    Image.new("RGB", (8, 8)).save(tmp_path / "fakes_000000kimg.png")
    tracker.log_grid("fakes", 0, tmp_path / "fakes_000000kimg.png")
    tracker.close()
    onnx_path = tmp_path / "gen.onnx"
    export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), onnx_path, {})
    info = {"recipe": "tiny", "kimg": 4.0, "metric": {"name": "fid2k", "value": 3.0}, "dataset_digest": "dada"}
    assert register(server, run_id, "catgan", onnx_path, info) == "1"
    end_run(tmp_path, server, "FINISHED", register=register)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "loss/generator")] == [0, 1, 2, 3, 4]
    assert len(client.list_artifacts(run_id, "images")) == 2
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == ["samples/fakes_000000kimg.png"]
    version = client.get_model_version_by_alias("catgan", "champion")
    assert version.run_id == run_id
    files = [
        path for path in (folder / "mlartifacts").rglob("model.onnx") if path.read_bytes() == onnx_path.read_bytes()
    ]
    assert len(files) == 1
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlartifacts"}
    assert {path.name for path in folder.parents[1].iterdir()} == {folder.parent.name, "log"}, "no decoded folder"
    output = capsys.readouterr()
    message = "models:/catgan@champion moves to version 1: there was no champion\n"
    assert (output.out, output.err) == ("", message), "messages of MLflow itself must not reach a command's output"


@pytest.mark.slow
def test_catinfer_lists_the_registered_generators_and_how_to_download_them(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(server)
    experiment, name = client.create_experiment("listed"), "the 'best' cats @50%"
    export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), tmp_path / "gen.onnx", {})
    for version, value in enumerate((30.0, 20.0, 25.0), 1):
        path = tmp_path / str(version) / "gen.onnx"
        path.parent.mkdir()
        model = onnx.load(tmp_path / "gen.onnx")
        model.doc_string = f"version {version}"
        onnx.save(model, path)
        metric = {"name": "fid2k", "value": value, "n_fake": 2048}
        info = {"recipe": "tiny", "kimg": 4.0, "metric": metric, "dataset_digest": "dada"}
        run_id = client.create_run(experiment).info.run_id
        assert register(server, run_id, name, path, info) == str(version)
    client.create_registered_model("of another project")
    capsys.readouterr()
    models = {model.get("model"): model for model in catinfer(["--list", server])["models"]}
    assert set(models) >= {None, f"models:/{name}@champion", f"models:/{name}/3"}
    assert {f"models:/{name}/1", f"models:/{name}/2", "models:/of another project/1"}.isdisjoint(models)
    champion = models[f"models:/{name}@champion"]
    assert (champion["size"], champion["recipe"], champion["metric_value"]) == (8, "tiny", 20)
    with urllib.request.urlopen(champion["download"], timeout=20) as answer:
        assert answer.read() == (tmp_path / "2" / "gen.onnx").read_bytes()

    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("To use ")]
    if shutil.which("curl"):
        download, _, generate = line.partition(": ")[2].partition(" && ")
        subprocess.run(["bash", "-c", download], check=True, timeout=30, capture_output=True)
        assert catinfer([*shlex.split(generate)[1:], "--n", "1", "--device", "cpu"])["n"] == 1


@pytest.mark.parametrize("name", ["runs", "a b", "a%20b", "50%", "what?", "#1", "ü", "-n", "a'b\"c", "$HOME", "a\\b"])
def test_it_serves_the_database_of_trainings_in_the_same_folder(name: str, tmp_path: Path) -> None:
    script = tmp_path / "checkout" / "mlflow" / "serve.sh"
    mlflow = tmp_path / "checkout" / ".venv" / "bin" / "mlflow"
    for path in (script, mlflow):
        path.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    mlflow.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    mlflow.chmod(0o755)
    done = subprocess.run([script, f"./{name}"], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    arguments = done.stdout.splitlines()
    served = {option: arguments[arguments.index(option) + 1] for option in arguments if option.startswith("--")}
    assert served["--backend-store-uri"] == resolve_uri(None, tmp_path / name)
    assert served["--artifacts-destination"] == artifact_location(tmp_path / name / "mlartifacts")
    assert [path.name for path in tmp_path.iterdir() if path.name != "checkout"] == [name]


def test_help_and_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "usage: mlflow/serve.sh" in done.stdout
    (tmp_path / "file").write_text("")
    done = subprocess.run([SCRIPT, str(tmp_path / "file" / "runs")], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
