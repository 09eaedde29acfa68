"""Runs in a bucket: on an S3 server that may refuse requests, continued on other machines."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from catgan.command import UserError
from catgan.dataset import Manifest
from export.cli import main as catexport
from export.registry import register
from infer.cli import main as catinfer
from tests.processes import training_workers
from tests.trainer.launch.test_failures import Watch, last_state
from tests.trainer.launch.test_run import TINY
from tests.trainer.report.test_compare import rows_of
from tests.trainer.report.test_compare import train as recorded
from tests.trainer.test_loop import CONFIG, Notes, run, same, without_times
from trainer.checkpoints import checkpoint
from trainer.checkpoints import storage as storages
from trainer.checkpoints.storage import Storage, open_storage
from trainer.cli import main as cattrain
from trainer.config import Config
from trainer.distributed.context import LocalContext, Request
from trainer.launch import driver
from trainer.launch.connect import Workers
from trainer.launch.signals import Stopped
from trainer.launch.worker import Job
from trainer.loop import Outcome, Run, train
from trainer.report import page
from trainer.tracking.outbox import POSITIONS, Outbox
from trainer.tracking.recorder import Recorder
from trainer.tracking.tracker import open_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
RUN = "s3://cats/runs/one"


def until(reached: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait until ``reached()`` is true. Fails if ``process`` exits before."""
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return Manifest.load(shards)


def train_in(
    location: str, config: Config, manifest: Manifest, notes: Notes, context: LocalContext | None = None
) -> Storage:
    storage = open_storage(location)
    storage.make()
    storage.pull()
    recorder = Recorder(manifest, storage, notes, "the-run")  # type: ignore[arg-type]
    assert train(config, manifest, context or LocalContext(), Run(storage, "the-run"), recorder).status == "done"
    storage.push()
    return storage


@pytest.mark.usefixtures("tiny_extractor")
def test_a_run_in_a_bucket_survives_refusals_and_continues_on_another_machine(
    manifest: Manifest, tmp_path: Path, bucket: Callable[[bool], None], monkeypatch
):
    run(CONFIG, manifest, tmp_path / "whole", Notes())
    notes = Watch(at_64=lambda: bucket(True), at_96=lambda: bucket(False))
    first = train_in(RUN, replace(CONFIG, kimg=0.128), manifest, notes)
    ((kind, text),) = notes.notes
    assert kind == "save"
    assert "not saved in s3://cats/runs/one" in text
    assert first.checkpoints() == [checkpoint.folder_name(128)]

    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache of another machine"))
    second = train_in("s3://cats/runs/one/", CONFIG, manifest, notes)
    assert second.work != first.work
    assert second.checkpoints() == [checkpoint.folder_name(n) for n in (128, 192)]
    assert same(last_state(tmp_path / "whole"), without_times(second.load(second.checkpoints()[-1])))
    third = open_storage(RUN)
    for path in second.work.rglob("*"):
        path.unlink() if path.is_file() else None
    third.pull()
    names = {path.relative_to(third.work).as_posix() for path in third.work.rglob("*") if path.is_file()}
    assert names == {"reals.png", "samples/fakes_000000kimg.png", "best/gen.safetensors"}

    second.save(checkpoint.folder_name(256), {"state.pt": b"cut", "checkpoint.json": b"off"})
    assert third.latest()[0] == checkpoint.folder_name(192)


def test_a_bucket_that_refuses_from_the_start_is_reported_at_once(bucket: Callable[[bool], None]):
    with pytest.raises(UserError, match="nothing can be written to a web server"):
        open_storage("http://127.0.0.1/runs/one")
    storage = open_storage("s3://cats/runs/two")
    bucket(True)
    with pytest.raises(UserError, match=r"cannot write s3://cats/runs/two .*give another --out"):
        storage.make()
    with pytest.raises(UserError, match="cannot list s3://cats/runs/two"):
        storage.checkpoints()


@pytest.mark.parametrize("ending", ["stopped", "interrupted", "failed"])
def test_the_driver_adds_to_records_of_rank_zero_on_another_machine(
    shards: Path, tmp_path: Path, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, ending: str
):
    def elsewhere(job: Job, workers: Workers) -> Outcome:
        monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache of another machine"))
        storage = open_storage(job.location)
        storage.pull()
        Outbox(storage.work).put({"kind": "scalars", "time": 1, "nimg": 32, "values": {"loss/generator": 1.0}})
        storage.push()
        monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
        raise {"stopped": Stopped(143), "interrupted": KeyboardInterrupt(), "failed": UserError("lost")}[ending]

    monkeypatch.setattr(driver, "run_on_ray", elsewhere)
    monkeypatch.setattr(driver, "connect_ray", lambda _: None)
    command = ["--data", str(shards), "--out", "s3://cats/runs", "--name", "one", "--workers", "1", "--track.offline"]
    with pytest.raises({"stopped": SystemExit, "interrupted": KeyboardInterrupt, "failed": UserError}[ending]):
        driver.main(command)
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "a third cache"))
    storage = open_storage(RUN)
    storage.pull()
    kinds = [record["kind"] for record, _ in Outbox(storage.work).journal.read()]
    assert kinds == ["open", "scalars", "artifact", "status"]


def test_records_that_cannot_be_fetched_are_not_overwritten(
    shards: Path, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
):
    def refused(job: Job) -> Outcome:
        bucket(True)
        return Outcome("stopped")

    monkeypatch.setattr(driver, "run_in_process", refused)
    command = ["--data", str(shards), "--out", "s3://cats/runs", "--name", "one", "--workers", "0", "--track.offline"]
    with pytest.raises(UserError, match=rf"{RUN} cannot be read or written .*run the same command again"):
        driver.main(command)
    kinds = [record["kind"] for record, _ in Outbox(open_storage(RUN).work).journal.read()]
    assert kinds == ["open"]


@pytest.mark.usefixtures("tiny_extractor")
def test_training_continues_if_the_checkpoint_at_a_preemption_is_refused(
    manifest: Manifest, bucket: Callable[[bool], None]
):
    class Preempted(LocalContext):
        def request(self) -> Request | None:
            return "save" if next(ticks) == 3 else None

    ticks = itertools.count(1)
    notes = Watch(at_96=lambda: bucket(True), at_160=lambda: bucket(False))
    storage = train_in(RUN, CONFIG, manifest, notes, Preempted())
    assert {kind for kind, _ in notes.notes} == {"save"}
    assert storage.checkpoints()[-1] == checkpoint.folder_name(192)


@pytest.mark.usefixtures("tiny_extractor")
def test_a_checkpoint_that_cannot_be_read_at_present_is_not_skipped(
    manifest: Manifest, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
):
    storage = train_in(RUN, CONFIG, manifest, Notes())
    names = storage.checkpoints()
    monkeypatch.setattr(storage, "checkpoints", lambda: names)
    bucket(True)
    with pytest.raises(UserError, match=f"{names[-1]} cannot be read"):
        storage.latest()


@pytest.mark.usefixtures("tiny_extractor")
def test_incomplete_checkpoints_are_removed(manifest: Manifest, bucket: Callable[[bool], None]):
    storage = open_storage(RUN)
    orphan = f"{checkpoint.folder_name(100)}/state.pt"

    def leave_orphan() -> None:
        storage.filesystem.pipe_file(f"{storage.path}/{orphan}", b"begun")  # type: ignore[attr-defined]

    train_in(RUN, CONFIG, manifest, Watch(at_96=leave_orphan))
    assert orphan not in storage._names()  # type: ignore[attr-defined]
    leave_orphan()
    storage.make()
    assert orphan not in storage._names()  # type: ignore[attr-defined]
    assert storage.latest()[0] == checkpoint.folder_name(192)


def test_hidden_files_may_vanish_during_a_push(bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch):
    storage, original = open_storage(RUN), storages._stamp
    storage.make()
    for name in ("config.json", ".outbox.json"):
        (storage.work / name).write_text("{}")

    def stamp(path: Path) -> tuple[int, int]:
        (storage.work / ".outbox.json").unlink(missing_ok=True)  # another process has renamed it
        return original(path)

    monkeypatch.setattr(storages, "_stamp", stamp)
    storage.push()
    assert "config.json" in storage._names()  # type: ignore[attr-defined]


def upload(folder: Path, location: str) -> set[str]:
    """Store the run in ``folder`` in a bucket. Returns the names of all objects there."""
    storage = open_storage(location)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        storage._put(path.relative_to(folder).as_posix(), path.read_bytes())  # type: ignore[attr-defined]
    return set(storage._names())  # type: ignore[attr-defined]


def test_runs_in_a_bucket_and_in_a_folder_are_compared(
    bucket: Callable[[bool], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    here = recorded(tmp_path / "runs" / "here", {0: 90.0, 4: 20.0}, kimg=24.0)
    there = recorded(tmp_path / "there", {0: 95.0, 8: 30.0}, kimg=24.0)
    (there / "checkpoint_000000008000").mkdir()
    (there / "checkpoint_000000008000" / "state.pt").write_bytes(b"large")
    before = upload(there, RUN)
    assert cattrain(["report", str(here), RUN]) == {"report": "compare.html", "run_dirs": [str(here), RUN]}
    page = Path("compare.html").read_text()
    assert [row[:3] for row in rows_of(page, "Best values and cost")[1:]] == [
        ["here", "20.00 at 4 kimg", "4 of 24"],
        ["one", "30.00 at 8 kimg", "8 of 24"],
    ]
    assert page.count("data:image/webp") == 4
    assert set(open_storage(RUN)._names()) == before  # type: ignore[attr-defined]
    assert not (tmp_path / "cache" / "runs").exists(), "nothing is left, and no checkpoint was downloaded"

    storage = open_storage(RUN)  # another training under the same name
    storage.filesystem.rm(storage.path, recursive=True)  # type: ignore[attr-defined]
    upload(recorded(tmp_path / "again", {0: 96.0}, kimg=24.0), RUN)
    cattrain(["report", RUN, str(here)])
    page = Path("compare.html").read_text()
    assert rows_of(page, "Best values and cost")[1][:3] == ["one", "96.00 at 0 kimg", "0 of 24"]
    assert page.count("data:image/webp") == 3


def test_a_report_leaves_what_a_training_writes_meanwhile(
    bucket: Callable[[bool], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = recorded(tmp_path / "1", {0: 90.0}), recorded(tmp_path / "2", {0: 90.0, 4: 20.0})
    storage, meanwhile = open_storage(RUN), [first, second]

    def write_report(folder: Path, path: Path | None, **options: Any) -> None:
        upload(meanwhile.pop(0), RUN)
        (path or folder / "report.html").write_bytes((folder / "metrics.jsonl").read_bytes())

    monkeypatch.setattr(page, "write_report", write_report)
    before = upload(first, RUN)
    for _ in range(2):
        assert cattrain(["report", RUN]) == {"report": f"{RUN}/report.html", "run_dir": RUN}
    assert set(storage._names()) == before | {"samples/fakes_000004kimg.png", "report.html"}  # type: ignore[attr-defined]
    assert storage._get("metrics.jsonl") == (second / "metrics.jsonl").read_bytes()  # type: ignore[attr-defined]
    assert storage._get("report.html") == (first / "metrics.jsonl").read_bytes()  # type: ignore[attr-defined]
    assert not storage.work.exists()


def test_records_of_a_run_in_a_bucket_are_delivered_once(shards: Path, bucket: Callable[[bool], None], tmp_path: Path):
    folder, uri = tmp_path / "one", f"sqlite:///{tmp_path}/mlflow.db"
    folder.mkdir()
    run_id = open_run(
        folder, uri, "cats", config=CONFIG.to_dict(), manifest=Manifest.load(shards), register=register, offline=True
    )
    before = upload(folder, RUN)
    found = cattrain(["sync", RUN, "--uri", uri])
    assert found["mlflow_run_id"] not in (None, run_id)
    assert found["delivered"] > 0
    assert set(open_storage(RUN)._names()) == before | set(POSITIONS)  # type: ignore[attr-defined]
    assert cattrain(["sync", RUN, "--uri", uri]) == found | {"delivered": 0}


def test_what_is_no_run_in_a_bucket_is_not_downloaded(bucket: Callable[[bool], None], tmp_path: Path):
    upload(recorded(tmp_path / "one", {0: 90.0}), RUN)
    no_run = "is not a run: it has none of"
    for locations, message in (
        ([RUN, "s3://cats/runs/two"], f"^s3://cats/runs/two {no_run}"),
        ([RUN, "s3://cats"], f"^s3://cats {no_run}"),
        (["s3://cats/runs"], f"^s3://cats/runs {no_run}"),
        (["s3://dogs/one", RUN], "^s3://dogs/one: The specified bucket does not exist"),
        (["s3://dogs/one"], "^s3://dogs/one: The specified bucket does not exist"),
        ([RUN, f"{RUN}/"], f"^{RUN} is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            cattrain(["report", *locations, "-o", str(tmp_path / "c.html")])
    assert not (tmp_path / "c.html").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_names_in_a_bucket_that_are_no_files_of_the_run(bucket: Callable[[bool], None], tmp_path: Path):
    upload(recorded(tmp_path / "one", {0: 90.0}), RUN)
    client = boto3.client("s3")
    for name in ("", "samples/", "../evil", "samples/../../../evil"):  # markers of folders, as S3's console makes them
        client.put_object(Bucket="cats", Key=f"runs/one/{name}", Body=b"")
    storage = open_storage(RUN)
    storage.pull()
    expected = {"config.json", "metrics.jsonl", "outbox.jsonl", "samples/fakes_000000kimg.png"}
    assert {str(path.relative_to(storage.work)) for path in storage.work.rglob("*") if path.is_file()} == expected
    assert not list(tmp_path.rglob("evil"))


UPLOAD = """
import sys, time
from pathlib import Path
from tests.trainer.launch.test_buckets import RUN, train_in
from tests.trainer.test_loop import CONFIG, Notes
from catgan.dataset import Manifest
from trainer.checkpoints.storage import Bucket

put = Bucket._put


def stop_before_the_last_file(self, name, data):
    if name == "checkpoint_000000000128/checkpoint.json":
        Path(sys.argv[2]).touch()
        time.sleep(600)
    put(self, name, data)


Bucket._put = stop_before_the_last_file
train_in(RUN, CONFIG, Manifest.load(sys.argv[1]), Notes())
"""


@pytest.mark.soak
def test_killed_while_a_checkpoint_is_uploaded(
    manifest: Manifest, shards: Path, tmp_path: Path, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
):
    run(CONFIG, manifest, tmp_path / "whole", Notes())
    uploading = tmp_path / "uploading"
    training = subprocess.Popen([sys.executable, "-c", UPLOAD, str(shards), str(uploading)], cwd=ROOT)
    try:
        until(uploading.exists, training)
    finally:
        training.kill()
    assert training.wait() == -signal.SIGKILL
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache of another machine"))
    storage = open_storage(RUN)
    assert storage.checkpoints() == [checkpoint.folder_name(64)]
    assert f"{checkpoint.folder_name(128)}/state.pt" in storage._names()  # type: ignore[attr-defined]
    train_in(RUN, CONFIG, manifest, Notes())
    assert storage.checkpoints() == [checkpoint.folder_name(n) for n in (128, 192)]
    assert same(last_state(tmp_path / "whole"), without_times(storage.load(storage.checkpoints()[-1])))


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_worker_is_killed_and_the_generator_is_in_the_bucket(
    shards: Path, tmp_path: Path, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
):
    command = ["--data", shards, "--out", "s3://cats/runs", "--name", "one", "--workers", "1", *TINY, "--kimg", "0.512"]
    command += ["--track.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    log_file, storage = tmp_path / "log", open_storage(RUN)
    with log_file.open("w") as log:
        training = subprocess.Popen(
            [sys.executable, str(ROOT / "trainer" / "run.py"), *map(str, command)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        until(storage.checkpoints, training)
        processes = psutil.Process(training.pid).children(recursive=True)
        (worker,) = training_workers(processes)
        worker.kill()
        output, _ = training.communicate(timeout=300)
    finally:
        training.kill()
    assert training.returncode == 0, log_file.read_text()
    assert "warning: lost worker 0" in log_file.read_text()
    result = json.loads(output.splitlines()[-1])
    assert (result["run_dir"], result["kimg"], result["onnx"]) == (RUN, 0.512, f"{RUN}/best/gen.onnx")
    assert {"best/gen.onnx", "best/card.md", "report.html", "metrics.jsonl"} <= set(storage._names())  # type: ignore[attr-defined]

    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "another machine"))
    catexport([RUN, "-o", str(tmp_path / "gen.onnx"), "--data", "none"])
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    theirs_onnx = tmp_path / "theirs.onnx"
    theirs_onnx.write_bytes(storage._get("best/gen.onnx"))  # type: ignore[attr-defined]
    for onnx, image in ((tmp_path / "gen.onnx", ours), (theirs_onnx, theirs)):
        catinfer(["--onnx", str(onnx), "--n", "4", "--out", str(image), "--device", "cpu"])
    assert ours.read_bytes() == theirs.read_bytes()
    storage.filesystem.rm_file(f"{storage.path}/report.html")  # type: ignore[attr-defined]
    assert cattrain(["report", RUN]) == {"report": f"{RUN}/report.html", "run_dir": RUN}
    assert "report.html" in storage._names()  # type: ignore[attr-defined]
