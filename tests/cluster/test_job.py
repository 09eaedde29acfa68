"""Training as a job, from ``ray job submit`` to an image: its own cluster, a plain checkout, the real commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from trainer.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parents[2]
JOB_TIMEOUT_S = 400

# Appended to trainer/recipes/__init__.py.
SHORTER = """

_resolve = resolve


def resolve(name: str | None, data_size: int | None, gpu: bool) -> Config:
    full = _resolve(name, data_size, gpu)
    track = replace(full.track, tick_kimg=0.1, snapshot_kimg=0.25)
    return replace(full, kimg=0.5, eval=replace(full.eval, num=64), track=track)
"""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(sandbox: Any) -> Iterator[Any]:
    """The sandbox with its cluster running."""
    started = sandbox.start("--cpus", "2")
    assert started.returncode == 0, started.stdout
    return sandbox


@pytest.fixture(scope="module")
def checkout(sandbox: Any) -> Path:
    """A copy of this working tree's files, as in a fresh clone, with large files that must not be uploaded."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs the system package git")
    command = [git, "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    folder: Path = sandbox.home / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in (".venv/lib/torch.so", "out/runs/a/state.pt", "cats/train-000000.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(2**22))
    return folder


@pytest.fixture(scope="module")
def short_checkout(checkout: Path) -> Path:
    """A checkout whose recipes end early, so that a job without arguments takes a minute."""
    folder = checkout.with_name("short")
    shutil.copytree(checkout, folder)
    with (folder / "trainer" / "recipes" / "__init__.py").open("a") as recipes:
        recipes.write(SHORTER)
    return folder


def _submit(cluster: Any, checkout: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Submit ``python trainer/run.py ARGUMENTS`` and wait; returns its JSON object."""
    done = cluster.run(
        *("ray", "job", "submit", "--working-dir", ".", "--submission-id", name),
        *("--", "python", "trainer/run.py", *arguments),
        cwd=checkout,
        timeout=JOB_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    status = cluster.run("ray", "job", "status", name)
    assert f"Job '{name}' succeeded" in status.stdout
    printed = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(printed) == 1, done.stdout
    value: dict[str, Any] = json.loads(printed[0])
    return value


def _check_upload(cluster: Any) -> None:
    """The job's working folder holds the program alone."""
    (package,) = cluster.home.glob("c/ray0/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (package / "trainer" / "run.py").is_file()
    assert sum(path.stat().st_size for path in package.rglob("*.*") if path.is_file()) < 2**21


def _check_run(result: dict[str, Any], run_dir: Path) -> None:
    """The run's folder is complete."""
    assert result["run_dir"] == str(run_dir)
    assert result["kimg"] > 0
    assert json.loads((run_dir / "config.json").read_text())["mlflow_run_id"] == result["mlflow_run_id"]
    positions = [json.loads(line)["nimg"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert positions
    assert positions == sorted(positions)
    samples = sorted((run_dir / "samples").glob("fakes_*kimg.png"))
    for path in [run_dir / "reals.png", *samples]:
        with Image.open(path) as image:
            assert image.width >= 32
    assert samples
    assert result["onnx"] == str(run_dir / "best" / "gen.onnx")
    for name in ("gen.onnx", "gen.safetensors", "card.md"):
        assert (run_dir / "best" / name).stat().st_size > 0


def _check_mlflow(result: dict[str, Any], run_dir: Path) -> None:
    """MLflow has one finished run with metrics, images, the data set and a registered model."""
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    assert result["metric"]["name"] in run.data.metrics
    assert run.data.params["recipe"]
    assert run.inputs
    assert run.inputs.dataset_inputs
    folders = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert {"images", "samples"} <= folders
    versions = client.search_model_versions(f"run_id='{run.info.run_id}'")
    assert [version.status for version in versions] == ["READY"]
    assert len(client.search_runs([run.info.experiment_id], f"attributes.run_name = '{run_dir.name}'")) == 1


def _check_image(cluster: Any, onnx: str) -> None:
    """catinfer generates images that are not empty."""
    path = cluster.home / "cats.png"
    done = cluster.run("catinfer", "--onnx", onnx, "--n", "4", "--out", str(path))
    assert done.returncode == 0, done.stdout
    with Image.open(path) as image:
        assert np.ptp(np.asarray(image.convert("RGB"))) > 10


def _tiny(shards: Path, out: Path) -> list[str]:
    """Options of a training with two workers that reaches a checkpoint within seconds."""
    return [
        *("--data", str(shards), "--workers", "2", "--out", str(out), "--name", "cats"),
        *("--batch", "8", "--model.g-width", "8", "--model.d-width", "8", "--eval.num", "32"),
        *("--track.tick-kimg", "0.032", "--track.snapshot-kimg", "0.064"),
    ]


def _until_checkpoints(
    cluster: Any, job: str, run_dir: Path, number: int, submitted: Future[dict[str, Any]] | None = None
) -> None:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while len(checkpoint.find_all(run_dir)) < number:
        assert time.monotonic() < deadline, cluster.run("ray", "job", "logs", job).stdout
        if submitted is not None and submitted.done():
            raise AssertionError("the job has ended") from submitted.exception()
        time.sleep(0.2)


def _positions(run_dir: Path) -> list[int]:
    return [json.loads(line)["nimg"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _check_all(cluster: Any, result: dict[str, Any], run_dir: Path) -> None:
    _check_upload(cluster)
    _check_run(result, run_dir)
    _check_mlflow(result, run_dir)
    _check_image(cluster, result["onnx"])


@pytest.mark.timeout(JOB_TIMEOUT_S + 120)
def test_a_job_continues_after_one_of_its_two_workers_is_killed(cluster: Any, checkout: Path, shards: Path) -> None:
    out = cluster.home / "killed"
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(_submit, cluster, checkout, "killed", *_tiny(shards, out), "--kimg", "2")
        _until_checkpoints(cluster, "killed", out / "cats", 1, job)
        cluster.workers()[-1].kill()
        result = job.result()
    logs = cluster.run("ray", "job", "logs", "killed").stdout
    assert "\nwarning: lost worker" in logs
    assert "\nkimg " in logs, "lines of workers have no prefix"
    positions = _positions(out / "cats")
    assert positions == sorted(positions)
    assert positions[-1] == 2000
    _check_all(cluster, result, out / "cats")


@pytest.mark.soak
@pytest.mark.timeout(2 * JOB_TIMEOUT_S + 120)
def test_a_stopped_job_with_two_workers_continues(cluster: Any, checkout: Path, shards: Path) -> None:
    out = cluster.home / "stopped"
    arguments = _tiny(shards, out)
    submit = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", "endless", "--no-wait", "--"]
    begun = cluster.run(*submit, "python", "trainer/run.py", *arguments, "--kimg", "1000", cwd=checkout)
    assert begun.returncode == 0, begun.stdout
    # Once there is a second checkpoint, the first one is complete.
    _until_checkpoints(cluster, "endless", out / "cats", 2)
    stopped = cluster.run("ray", "job", "stop", "endless")
    assert stopped.returncode == 0, stopped.stdout
    assert "stopped" in cluster.run("ray", "job", "status", "endless").stdout.lower()

    left = checkpoint.find_all(out / "cats")[-1]
    state = checkpoint.load(left)
    said = cluster.run("ray", "job", "logs", "endless").stdout
    assert f"stopped after a checkpoint; to continue from {state['nimg'] / 1000:g} kimg, give --name cats" in said
    kimg = (state["nimg"] + 64) / 1000
    result = _submit(cluster, checkout, "continued", *arguments, "--kimg", str(kimg))
    assert result["kimg"] == pytest.approx(kimg)
    assert result["mlflow_run_id"] == state["run_id"]
    positions = _positions(out / "cats")
    assert positions == sorted(positions)
    assert positions[0] <= 32
    assert f"continuing from {left}" in cluster.run("ray", "job", "logs", "continued").stdout
    _check_all(cluster, result, out / "cats")


@pytest.mark.soak
@pytest.mark.timeout(JOB_TIMEOUT_S + 120)
def test_a_job_without_arguments(cluster: Any, short_checkout: Path) -> None:
    """The default recipe on drawn cats. The job's working folder is deleted, so the run is in the home folder."""
    result = _submit(cluster, short_checkout, "no-arguments")
    run_dir = Path(result["run_dir"])
    assert run_dir.parent == cluster.home / "catgan" / "runs"
    _check_run(result, run_dir)
    _check_mlflow(result, run_dir)
    _check_image(cluster, result["onnx"])
