"""A real MLflow server that is killed, hangs and comes back while trainings send records to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from catgan.dataset import Manifest, Split
from export.registry import register
from trainer.tracking.outbox import Outbox
from trainer.tracking.server import connect
from trainer.tracking.tracker import Tracker, end_run, open_run

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = Manifest("/data/cats", 8, {"train": Split(())}, 0, (), {}, "test")


class Server:
    """``mlflow/serve.sh`` on a free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.folder.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(
                [ROOT / "mlflow" / "serve.sh", self.folder, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        wait_until(self.answers)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.folder.with_suffix(".log").read_text()
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served") / "runs")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_and_then_hangs_loses_and_doubles_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("trainer.tracking.outbox._RETRY_SECONDS", 0.3)
    outbox = Outbox(tmp_path)
    run_id = open_run(tmp_path, server.uri, "catgan", config={"recipe": "tiny"}, manifest=MANIFEST, register=register)
    tracker = Tracker(tmp_path, server.uri, register=register)
    output = ""

    def log(*kimgs: int) -> None:
        for kimg in kimgs:
            tracker.log_scalars({"x": float(kimg), "y": -float(kimg)}, kimg * 1000)
            if kimg % 5 == 0:
                path = tmp_path / f"fakes_{kimg:06d}kimg.png"
                Image.new("RGB", (8, 8)).save(path)
                tracker.log_grid("fakes", kimg * 1000, path)
                tracker.note("news", f"{kimg} reached", kimg * 1000)

    def failure_reported() -> bool:
        nonlocal output
        output += capsys.readouterr().err
        return "accepts no records" in output

    log(*range(1, 6))
    wait_until(lambda: outbox.num_undelivered() == 0)  # during training
    log(*range(6, 11))
    server.kill()  # perhaps between storing a record and answering
    log(*range(11, 16))
    wait_until(failure_reported)
    server.start()
    log(16)
    wait_until(lambda: outbox.num_undelivered() == 0)
    output = ""
    server.signal(signal.SIGSTOP)  # it accepts connections but never answers
    log(*range(17, 21))
    wait_until(failure_reported)
    server.signal(signal.SIGCONT)  # and now also handles the requests that timed out
    wait_until(lambda: outbox.num_undelivered() == 0)
    log(21)
    tracker.close()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    end_run(tmp_path, server.uri, "FINISHED", register=register)

    client = connect(server.uri)
    for key, sign in (("x", 1.0), ("y", -1.0)):
        points = client.get_metric_history(run_id, key)
        assert [(point.step, point.value) for point in points] == [(kimg, sign * kimg) for kimg in range(1, 22)]
        assert points == sorted(points, key=lambda point: point.timestamp)
    assert len(client.list_artifacts(run_id, "images")) == 2 * 4
    assert len(client.list_artifacts(run_id, "samples")) == 4
    events = Path(client.download_artifacts(run_id, "events.txt", str(tmp_path))).read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in events] == [f"{kimg} reached" for kimg in (5, 10, 15, 20)]
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.soak
@pytest.mark.slow
def test_a_training_and_then_its_server_are_killed(server: Server, shards: Path, tmp_path: Path) -> None:
    """kill -9 of the training, the same command again, kill -9 of the server: training ends, sync delivers the rest."""
    command = [
        *(sys.executable, ROOT / "trainer" / "run.py", "--data", shards, "--out", tmp_path, "--name", "mine"),
        *("--workers", "0", "--kimg", "0.64", "--batch", "8", "--eval.extractor", "efflite0", "--eval.num", "32"),
        *("--model.g-width", "8", "--model.d-width", "8", "--track.tick-kimg", "0.064"),
        *("--track.snapshot-kimg", "0.128", "--track.model", "away"),
        *("--track.uri", server.uri.replace("://", "://me:secret@")),
    ]
    run_dir = tmp_path / "mine"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def logs_after(opened: int, process: subprocess.Popen[str], nimg: int) -> bool:
        """Whether the process has queued scalars at ``nimg`` images or more since the run was opened so many times."""
        assert process.poll() is None, process.communicate()[1]
        records = list(Outbox(run_dir).journal.records()) if run_dir.exists() else []
        starts = [i for i, record in enumerate(records) if record["kind"] == "open"]
        return len(starts) == opened and any(
            record["kind"] == "scalars" and record["nimg"] >= nimg for record in records[starts[-1] :]
        )

    first = start()
    wait_until(lambda: logs_after(1, first, 192))  # a tick beyond the first checkpoint
    first.kill()
    first.communicate()
    (run_id,) = (run.info.run_id for run in connect(server.uri).search_runs(["1"], "tags.`mlflow.runName` = 'mine'"))
    assert connect(server.uri).get_run(run_id).info.status == "RUNNING"

    second = start()
    wait_until(lambda: logs_after(2, second, 192))  # beyond the first process: what that has queued is not repeated
    server.kill()
    output, messages = second.communicate(timeout=300)
    assert second.returncode == 0, messages
    assert json.loads(output)["mlflow_run_id"] == run_id
    assert "continuing from" in messages
    assert f"`cattrain sync {run_dir}`" in messages
    assert (run_dir / "best" / "gen.onnx").is_file()
    assert "secret" not in output + messages
    for path in run_dir.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path

    sync = [sys.executable, "-m", "trainer.cli", "sync", str(run_dir)]
    server.start()
    killed = subprocess.Popen(sync, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    num = Outbox(run_dir).num_undelivered()
    wait_until(lambda: Outbox(run_dir).num_undelivered() < num)
    killed.kill()
    killed.wait()
    done = subprocess.run(sync, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mlflow_run_id"] == run_id

    client = connect(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id], "tags.`mlflow.runName` = 'mine'")) == 1
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for key in run.data.metrics:
        expected = [line[key] for line in lines if key in line]
        values = [p.value for p in sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)]
        if key.startswith(("speed/", "system/")):
            assert len(values) >= len(expected), "repeated steps take another time"
            assert values[-1] == expected[-1]
        else:
            assert values == expected, key
    assert [line["nimg"] for line in lines if "loss/generator" in line] == list(range(64, 641, 64))
    assert len(client.list_artifacts(run_id, "images")) == 2 * 6
    (version,) = client.search_model_versions("name = 'away'")
    assert (version.run_id, version.version) == (run_id, "1")
