"""``trainer/sweep.py`` with tiny trainings on a Ray cluster of this machine, called like a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from trainer.sweeps import driver

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    *("--eval.extractor", "efflite0", "--eval.num", "32", "--batch", "8"),
    *("--model.g-width", "4", "--model.d-width", "4", "--track.tick-kimg", "0.064"),
]


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """One cluster for all sweeps of this process: the first one starts it."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    yield
    import ray

    ray.shutdown()
    os.environ.clear()
    os.environ.update(saved)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("_cluster")
def test_a_sweep_ends_with_the_best_and_is_continued(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One of three trials fails, and it alone. The same command completes it, and nothing else."""
    folder = tmp_path / "s"
    options = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--name", "s", *TINY, "--kimg", "0.128"]
    options += ["--try", "optim.g-lr=1e-4,1e-3,1e-2", "--trials", "3", "--first-rung", "0.064", "--confirm", "0"]
    folder.mkdir()
    (folder / "t01").write_text("in the way")

    first = driver.main(options)
    said = capsys.readouterr().err
    assert first["trials"]["failed"] == 1, said
    assert first["trials"]["done"] + first["trials"]["stopped"] == 2, said
    assert f"t01 has failed: cannot create or lock {folder / 't01'}" in said
    assert "Traceback" not in said
    assert first["metric"] == "fd32_efflite0"
    assert first["is_more_than_noise"] is None
    assert (folder / "sweep.html").stat().st_size > 0
    values = {record["name"]: record["values"] for record in lines(folder / "sweep.jsonl") if record["kind"] == "trial"}
    assert first["best"] == values[first["trial"]]
    for name in ("t00", "t02"):
        assert (folder / name / "report.html").is_file()
        assert "kimg     0.06/0.128" in (folder / name / "log.txt").read_text()
        config = json.loads((folder / name / "config.json").read_text())
        assert config["optim"]["g_lr"]["end"] == float(values[name]["optim.g-lr"])

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("catgan").experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == first["mlflow_run_id"]]
    assert sorted(run.info.run_name for run in children) == ["t00", "t02"]
    parent = client.get_run(first["mlflow_run_id"])
    assert parent.info.run_name == "s"
    assert parent.data.metrics["sweep/distance"] == pytest.approx(first["distance"])
    assert parent.data.tags["best.optim.g-lr"] == first["best"]["optim.g-lr"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"sweep.html", "sweep.json"}

    assert not client.search_model_versions(), "the best of many trials is one by luck"
    assert (folder / "t00" / "best" / "gen.onnx").is_file()

    (folder / "t01").unlink()
    before = {name: (folder / name / "metrics.jsonl").read_bytes() for name in ("t00", "t02")}
    again = driver.main(options)
    assert again["trials"]["failed"] == 0
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    assert before == {name: (folder / name / "metrics.jsonl").read_bytes() for name in ("t00", "t02")}
    assert "t00 running" not in capsys.readouterr().err
    assert (folder / "t01" / "metrics.jsonl").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of trial t01 is a file system of 250 KB, which its checkpoint does not fit into."""
    folder = tmp_path / "s" / "t01"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.soak
@pytest.mark.usefixtures("_cluster")
def test_a_full_disk_in_one_trial_ends_that_trial_only(
    shards: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--name", "s", *TINY, "--kimg", "0.128"]
    options += ["--try", "optim.g-lr=1e-4,1e-3", "--trials", "2", "--first-rung", "0.064", "--reduction", "0"]
    options += ["--confirm", "0", "--track.offline"]
    first = driver.main(options)
    said = capsys.readouterr().err
    assert first["trials"] == {"done": 1, "stopped": 0, "failed": 1, "waiting": 0}, said
    assert first["trial"] == "t00"
    assert f"t01 has failed: the last checkpoint cannot be saved in {small_disk}; make room, then run it again" in said
    assert not list(small_disk.glob("checkpoint_*"))

    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    again = driver.main(options)
    assert again["trials"] == {"done": 2, "stopped": 0, "failed": 0, "waiting": 0}, capsys.readouterr().err
    assert list(small_disk.glob("checkpoint_*"))


class Command:
    """``trainer/sweep.py`` as a process of its own."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.log = folder / "s", folder / "log"
        command = [sys.executable, ROOT / "trainer" / "sweep.py", "dcgan-cpu-32", "--out", folder, "--name", "s", *TINY]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def wait_for(self, kind: str, name: str) -> None:
        """Until the journal has such an event of a trial."""
        journal = self.folder / "sweep.jsonl"
        while not journal.is_file() or not any(
            record["kind"] == kind and record.get("name") == name for record in lines(journal)
        ):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def trial_processes(self) -> list[psutil.Process]:
        # A file of a trial that is open tells its process from others.
        def writes(process: psutil.Process) -> bool:
            try:
                return any(file.path.endswith("log.txt") for file in process.open_files())
            except psutil.Error:
                return False

        return [process for process in psutil.Process(self.process.pid).children(recursive=True) if writes(process)]

    def result(self) -> dict:
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        return json.loads(out)


@pytest.mark.soak
def test_killed_trials_and_commands_are_continued(shards: Path, tmp_path: Path):
    options = ["--data", shards, "--try", "optim.g-lr=1e-4,1e-3", "--kimg", "2.048", "--first-rung", "0.256"]
    options += [
        "--confirm",
        "0",
        "--reduction",
        "100",
        "--at-once",
        "1",
        "--track.offline",
        "--track.snapshot-kimg",
        "0.256",
    ]
    first = Command(tmp_path, *options)
    first.wait_for("point", "t00")
    (process,) = first.trial_processes()
    process.kill()  # it continues in another process
    first.wait_for("point", "t01")
    assert "t00: its process was lost" in first.log.read_text()
    first.process.kill()
    first.process.wait()

    positions = [record["nimg"] for record in lines(first.folder / "t00" / "metrics.jsonl")]
    assert positions == sorted(positions), "continued from its checkpoint"
    before = (first.folder / "t00" / "metrics.jsonl").read_bytes()
    done = Command(tmp_path, *options).result()
    assert done["trials"] == {"done": 2, "stopped": 0, "failed": 0, "waiting": 0}
    assert (first.folder / "t00" / "metrics.jsonl").read_bytes() == before, "a finished trial is kept"
    assert "continuing from" in (first.folder / "t01" / "log.txt").read_text()
    records = lines(first.folder / "sweep.jsonl")
    points = [(record["name"], record["kimg"]) for record in records if record["kind"] == "point"]
    assert len(points) == len(set(points)) == 16, "nothing is measured twice"


@pytest.mark.soak
def test_ctrl_c_keeps_everything_and_prints_the_best_so_far(shards: Path, tmp_path: Path):
    options = ["--data", shards, "--try", "optim.g-lr=1e-4,1e-3", "--kimg", "100", "--first-rung", "0.256"]
    command = Command(tmp_path, *options, "--track.offline", "--at-once", "1", "--track.snapshot-kimg", "0.256")
    command.wait_for("point", "t00")
    os.killpg(command.process.pid, signal.SIGINT)  # to all processes, as a terminal does
    assert command.process.wait(120) == 130
    said = command.log.read_text()
    assert "Traceback" not in said
    assert "best: t00" in said
    assert (command.folder / "sweep.html").is_file()
    assert list((command.folder / "t00").glob("checkpoint_*"))
    assert not (command.folder / "t01").exists()
