"""``trainer/run.py``, called like a user does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from catgan.command import UserError, run_command
from catgan.dataset import Manifest
from tests.trainer.damage import damage
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage
from trainer.data.cli import main as data_main
from trainer.launch import driver
from trainer.launch import ray as launch_ray
from trainer.launch.connect import Workers
from trainer.launch.signals import Stopped
from trainer.launch.worker import Job
from trainer.loop import Outcome
from trainer.tracking.recorder import Recorder
from trainer.tracking.server import with_password

ROOT = Path(__file__).resolve().parents[3]
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


def test_dry_run_writes_nothing(shards: Path, tmp_path: Path):
    done = run("--data", shards, "--out", tmp_path / "out", "--dry-run", "--kimg", 1, "--workers", "2")
    plan = result(done)
    assert (
        f"in {plan['steps']} steps of {plan['config']['batch']} images,\nwith 2 worker(s), from the beg" in done.stderr
    )
    assert plan["config"]["kimg"] == 1
    assert plan["images"] == Manifest.load(shards).splits["train"].images
    assert plan["shards"] == len(Manifest.load(shards).splits["train"].shards)
    assert plan["steps"] * plan["config"]["batch"] >= 1000
    assert plan["batch_per_worker"] * 2 == plan["config"]["batch"]
    assert min(plan["parameters"].values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_with_exit_status_2(shards: Path, tmp_path: Path):
    done = run("dcgan-64", "--data", shards, "--out", tmp_path, "--workers", "99", "--batch", "8", "--kimg", "0")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in ("32x32", "--size 64", "--workers 99", "--kimg 0"):
        assert part in done.stderr, part
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no-such-recipe"], "Families"),
        (["--data", "{tmp}/nothing"], "catdata"),
        (["--data", "{shards}", "--out", "{tmp}", "--resume", "{tmp}/nothing"], "--resume"),
        (["--data", "{shards}", "--out", "{tmp}", "--init-from", "{tmp}/nothing"], "--init-from"),
    ],
)
def test_mistakes_write_nothing(shards: Path, tmp_path: Path, arguments: list[str], part: str):
    with pytest.raises(UserError, match=part):
        driver.main([word.format(tmp=tmp_path, shards=shards) for word in arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_extractor")
def test_a_run_in_process_is_continued_and_branched(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Train, continue, refuse to overwrite, start another run from its checkpoint."""

    def train(*arguments: object) -> dict:
        base = ["--data", shards, "--out", tmp_path, "--workers", "0", *TINY]
        return driver.main([str(word) for word in (*base, *arguments)])

    first = train("--name", "a", "--kimg", "0.128")
    assert "86 training images are few: the recipe `few`" in capsys.readouterr().err
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
    for name in ("gen.onnx", "gen.safetensors", "card.md", "samples.png", "directions.png"):
        assert (folder / "best" / name).stat().st_size > 0, name
    assert all(p.suffix == ".lock" for p in folder.iterdir() if p.name.startswith("."))

    capsys.readouterr()
    assert train("--name", "a", "--kimg", "0.128") == first
    said = capsys.readouterr().err
    assert "is finished" in said
    assert "other images" not in said
    data_main(["synth", str(tmp_path / "others"), "--num", "16", "--size", "32", "--seed", "1"])
    assert train("--name", "a", "--kimg", "0.128", "--data", tmp_path / "others") == first
    assert f"{folder} was trained on {shards} so far, and --data has other images" in capsys.readouterr().err

    second = train("--name", "a", "--kimg", "0.256")
    assert second["mlflow_run_id"] == first["mlflow_run_id"]
    assert second["kimg"] == 0.256
    positions = [json.loads(line)["nimg"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert positions == [64, 128, 128, 192, 256, 256]  # one line per tick, and one per evaluation

    with pytest.raises(UserError, match="already holds checkpoints"):
        train("--name", "a", "--resume", "never")
    branch = train("--name", "b", "--kimg", "0.384", "--resume", folder)
    assert branch["mlflow_run_id"] != first["mlflow_run_id"]
    assert branch["kimg"] == 0.384
    again = train("--name", "b", "--kimg", "0.512", "--resume", folder, "--dry-run")
    assert again["resume_from"] == str(tmp_path / "b" / "checkpoint_000000000384"), "its own, not its parent's"

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    logged = client.get_run(first["mlflow_run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["model.g_width"] == "8"
    assert {"loss/generator", "d/real", "lr/generator", "speed/data_wait", "fd32_efflite0"} <= set(logged.data.metrics)
    assert logged.inputs.dataset_inputs[0].dataset.digest == Manifest.load(shards).digest[:36]
    versions = client.search_model_versions("name='catgan'")
    assert sorted(v.run_id for v in versions) == sorted([first["mlflow_run_id"]] * 2 + [branch["mlflow_run_id"]])


def interrupted(monkeypatch: pytest.MonkeyPatch, place: object, name: str, options: list[str]) -> int:
    """Run the training with Ctrl-C when ``place.name`` is called. Returns the exit status."""
    original = getattr(place, name)

    def call(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        with pytest.raises(SystemExit) as ended:
            run_command("run.py", driver.main, options)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_extractor")
def test_ctrl_c_loses_nothing_and_promises_nothing_else(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ["--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--name", "a", "--kimg", "0.256", *TINY]

    assert interrupted(monkeypatch, driver, "run_in_process", options) == 130
    assert "interrupted; nothing was saved: there is no checkpoint yet\n" in capsys.readouterr().err

    assert interrupted(monkeypatch, Recorder, "tick", options) == 130
    said = capsys.readouterr().err
    assert "Ctrl-C: saving a checkpoint at the next tick" in said
    assert said.count("stopped after a checkpoint; to continue from 0.064 kimg, give --name a\n") == 1
    assert Storage(tmp_path / "a").checkpoints() == [checkpoint.folder_name(64)]

    assert interrupted(monkeypatch, driver, "finish", options) == 130
    said = capsys.readouterr().err
    assert "continuing from" in said
    assert "interrupted; to continue from 0.256 kimg, give --name a\n" in said
    assert not (tmp_path / "a" / "best" / "gen.onnx").exists()

    finished = driver.main(options)
    assert Path(finished["onnx"]).is_file()
    assert (tmp_path / "a" / "best" / "card.md").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("catgan").experiment_id])
    assert (run.info.run_id, run.info.status) == (finished["mlflow_run_id"], "FINISHED")


EXPORT = """
import sys, time
import export.card
from pathlib import Path
from trainer.launch.driver import main


def stop(onnx, info, difference):
    Path(sys.argv[1]).touch()
    time.sleep(600)


export.card.write_card = stop
main(sys.argv[2:])
"""


@pytest.mark.soak
@pytest.mark.slow
def test_a_run_that_is_killed_during_the_export_is_finished_by_the_same_command(shards: Path, tmp_path: Path):
    command = ["--data", shards, "--out", tmp_path, "--workers", "0", *TINY, "--name", "a", "--kimg", "0.128"]
    exporting = tmp_path / "exporting"
    killed = subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(exporting), *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not exporting.is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    best = tmp_path / "a" / "best"
    assert (best / "gen.onnx").exists()
    assert not (best / "card.md").exists()

    finished = result(run(*command))
    assert Path(finished["onnx"]).is_file()
    assert (best / "card.md").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name='catgan'")
    assert version.run_id == finished["mlflow_run_id"]
    assert len(client.get_metric_history(version.run_id, "loss/generator")) == 2


@contextmanager
def another_ray() -> Iterator[None]:
    """Another Ray cluster on this machine, as if started by a second training."""
    program = "import ray; ray.init(num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as other:
        assert other.stdout is not None
        assert any(line == b"up\n" for line in other.stdout)
        yield
        assert other.poll() is None
        other.communicate(b"\n")


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.slow
def test_a_mistake_found_by_a_worker_is_reported_once_without_a_retry(shards: Path, tmp_path: Path):
    data = shutil.copytree(shards, tmp_path / "shards")
    for number in range(len(Manifest.load(data).splits["train"].shards)):
        damage(Manifest.load(data), number)
    options = ["--data", data, "--out", tmp_path, "--name", "a", "--workers", "1", "--track.offline", *TINY]
    with another_ray():
        done = run(*options, "--kimg", "1000", "--loader.max-broken", "0.001")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("unusable") == 1, done.stderr
    assert "unusable" in done.stderr.splitlines()[-1]
    assert "lost worker" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_password_is_not_sent_to_workers(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def run_on_ray(job: Job, workers: Workers) -> Outcome:
        assert "secret" not in json.dumps(asdict(job))
        assert with_password(job.tracking_uri) == "http://me:secret@127.0.0.1:9"
        assert with_password("http://127.0.0.1:10") == "http://127.0.0.1:10"
        raise Stopped(143)

    monkeypatch.setattr(driver, "run_on_ray", run_on_ray)
    monkeypatch.setattr(driver, "cluster_gpus", lambda: 0)
    monkeypatch.setattr(driver, "connect_ray", lambda _: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    options = ["--data", str(shards), "--out", str(tmp_path), "--name", "a", "--workers", "1", "--track.offline"]
    with pytest.raises(SystemExit):
        driver.main([*options, "--track.uri", "http://me:secret@127.0.0.1:9"])
    said = capsys.readouterr().err
    assert "the password in --track.uri is not sent to the cluster" in said
    assert "secret" not in said
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_it_gives_up_after_four_failures_without_a_new_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from ray.train import WorkerGroupError

    storage, attempts = Storage(tmp_path), []

    def fit(new: set[int], mistake: int = 0) -> None:
        attempts.append(len(attempts) + 1)
        if attempts[-1] in new:
            storage.save(checkpoint.folder_name(attempts[-1]), {"state.pt": b"", "checkpoint.json": b""})
        error = UserError("a mistake") if attempts[-1] == mistake else ConnectionError("gone")
        raise WorkerGroupError("", {1: error})

    with pytest.raises(UserError, match=r"lost 4 times without a new checkpoint, the last time worker 1 \(gone\)"):
        launch_ray._fit_with_retries(lambda: fit(set()), storage)
    assert len(attempts) == 4
    assert capsys.readouterr().err.count("warning: lost worker 1 (gone)") == 3
    attempts.clear()
    with pytest.raises(UserError, match="lost 4 times"):
        launch_ray._fit_with_retries(lambda: fit({3, 6}), storage)
    assert len(attempts) == 6 + 3
    attempts.clear()
    with pytest.raises(UserError, match="a mistake"):
        launch_ray._fit_with_retries(lambda: fit(set(), mistake=2), storage)
    assert len(attempts) == 2
