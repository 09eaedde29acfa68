"""``trainer/run.py`` as a user calls it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from trainer.data.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--eval.extractor", "efflite0", "--eval.num", "32", "--batch", "8"),
    *("--model.g-width", "8", "--model.d-width", "8", "--track.tick-kimg", "0.064", "--track.snapshot-kimg", "0.128"),
]


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "trainer" / "run.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def result(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_dry_run_touches_nothing(shards: Path, tmp_path: Path):
    plan = result(run("--data", shards, "--out", tmp_path / "out", "--dry-run", "--kimg", 1, "--workers", "2"))
    assert plan["config"]["kimg"] == 1
    assert plan["images"] == Manifest.load(shards).splits["train"].images
    assert plan["shards"] == len(Manifest.load(shards).splits["train"].shards)
    assert plan["steps"] * plan["config"]["batch"] >= 1000
    assert plan["batch_per_worker"] * 2 == plan["config"]["batch"]
    assert min(plan["parameters"].values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_touch_nothing(shards: Path, tmp_path: Path):
    message = refused(
        run("dcgan-64", "--data", shards, "--out", tmp_path, "--workers", "99", "--batch", "8", "--kimg", "0")
    )
    for part in ("32x32", "--size 64", "--workers 99", "--kimg 0"):
        assert part in message, part
    assert "families" in refused(run("no-such-recipe"))
    assert "catdata" in refused(run("--data", tmp_path / "nothing"))
    assert "--resume" in refused(run("--data", shards, "--out", tmp_path, "--resume", tmp_path / "nothing"))
    assert "--init-from" in refused(run("--data", shards, "--out", tmp_path, "--init-from", tmp_path / "nothing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_process_and_what_follows_it(shards: Path, tmp_path: Path):
    """Train, continue, refuse to overwrite, start another run from a checkpoint."""
    base = ["--data", shards, "--out", tmp_path, "--workers", "0", *TINY]
    first = result(run(*base, "--name", "a", "--kimg", "0.128"))
    folder = tmp_path / "a"
    assert first["run_dir"] == str(folder)
    assert (first["kimg"], first["metric"]["name"]) == (0.128, "fd32_efflite0")
    for name in (
        "config.json",
        "metrics.jsonl",
        "reals.png",
        "progress.gif",
        "report.html",
        "samples/fakes_000000kimg.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    for name in ("gen.onnx", "gen.safetensors", "card.md", "samples.png"):
        assert (folder / "best" / name).stat().st_size > 0, name
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [".outbox.lock"]

    again = run(*base, "--name", "a", "--kimg", "0.128")
    assert "is finished" in again.stderr
    assert result(again) == first

    second = result(run(*base, "--name", "a", "--kimg", "0.256"))
    assert second["mlflow_run_id"] == first["mlflow_run_id"]
    assert second["kimg"] == 0.256
    positions = [json.loads(line)["nimg"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert positions == [64, 128, 128, 192, 256, 256]  # a tick each, and the metric at snapshots

    assert "already holds checkpoints" in refused(run(*base, "--name", "a", "--resume", "never"))
    branch = result(run(*base, "--name", "b", "--kimg", "0.384", "--resume", folder))
    assert branch["mlflow_run_id"] != first["mlflow_run_id"]
    assert branch["kimg"] == 0.384

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    logged = client.get_run(first["mlflow_run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.g_width"] == "8"
    assert {"loss/generator", "d/real", "lr/generator", "speed/data_wait", "fd32_efflite0"} <= set(logged.data.metrics)
    assert logged.inputs.dataset_inputs[0].dataset.digest == Manifest.load(shards).digest[:36]
    versions = client.search_model_versions("name='catgan'")
    assert sorted(v.run_id for v in versions) == sorted([first["mlflow_run_id"]] * 2 + [branch["mlflow_run_id"]])


@pytest.mark.slow
def test_killed_between_training_and_export_it_ends_well_later(shards: Path, tmp_path: Path):
    command = ["--data", shards, "--out", tmp_path, "--workers", "0", *TINY, "--name", "a", "--kimg", "0.128"]
    killed = subprocess.Popen(
        [sys.executable, str(ROOT / "trainer" / "run.py"), *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "a" / "checkpoint_000000000128" / "checkpoint.json").is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "a" / "best" / "gen.onnx").exists()

    finished = result(run(*command))
    assert Path(finished["onnx"]).is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name='catgan'")
    assert version.run_id == finished["mlflow_run_id"]
    assert len(client.get_metric_history(version.run_id, "loss/generator")) == 2
