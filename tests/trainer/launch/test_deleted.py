"""A run that was deleted from its bucket, and started again under its name on the same machine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from catgan.command import UserError
from export.source import open_source
from trainer.checkpoints.storage import open_storage
from trainer.launch import driver
from trainer.launch.signals import Stopped
from trainer.launch.worker import Job
from trainer.loop import Outcome

pytestmark = pytest.mark.slow

RUN = "s3://cats/runs/one"


def test_a_run_that_was_deleted_from_its_bucket_leaves_nothing_to_a_new_one_of_its_name(
    shards: Path, bucket: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["--data", str(shards), "--out", "s3://cats/runs", "--name", "one", "--workers", "0", "--track.offline"]
    grid, storage = "samples/fakes_000000kimg.png", open_storage(RUN)
    kept = [storage.work / name for name in ("log.txt", "sweep.jsonl", ".outbox.lock")]

    def stop(job: Job, write: bool = True) -> Outcome:
        if write:
            open_storage(RUN).write(grid, b"old")
        raise Stopped(143)

    def train() -> str:
        with pytest.raises(SystemExit):
            driver.main(command)
        return json.loads((storage.work / "config.json").read_text())["mlflow_run_id"]

    monkeypatch.setattr(driver, "run_in_process", stop)
    bucket(True)
    with pytest.raises(UserError):
        driver.main(command)
    bucket(False)
    first = train()
    assert train() == first, "which is in the bucket"
    for path in kept:
        path.write_text("kept")
    records = (storage.work / "outbox.jsonl").read_bytes()
    assert records
    storage.filesystem.rm(storage.path, recursive=True)  # type: ignore[attr-defined]
    capsys.readouterr()
    monkeypatch.setattr(driver, "run_in_process", lambda job: stop(job, write=False))
    assert train() != first
    assert grid not in storage._names()  # type: ignore[attr-defined]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "was deleted since" in line]
    aside = Path(line.rpartition(": ")[2])
    assert (aside / grid).read_bytes() == b"old"
    assert (aside / "outbox.jsonl").read_bytes() == records, "which MLflow may not have yet"
    assert [path.read_text() for path in kept] == ["kept"] * 3


def test_a_run_that_was_begun_anew_on_another_machine_is_continued_as_that_one(
    shards: Path,
    bucket: Callable[[bool], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = ["--data", str(shards), "--out", "s3://cats/runs", "--name", "one", "--workers", "0", "--track.offline"]
    machines = [tmp_path / "cache of this machine", tmp_path / "cache of another machine"]
    best = "best/gen.safetensors"

    def train(machine: int) -> str:
        monkeypatch.setenv("CATGAN_CACHE", str(machines[machine]))
        with pytest.raises(SystemExit):
            driver.main(command)
        return json.loads((open_storage(RUN).work / "config.json").read_text())["mlflow_run_id"]

    def stop(job: Job) -> Outcome:
        raise Stopped(143)

    monkeypatch.setattr(driver, "run_in_process", stop)
    old = train(0)
    storage = open_storage(RUN)
    storage.write(best, b"old")
    storage.push()
    storage.filesystem.rm(storage.path, recursive=True)  # type: ignore[attr-defined]
    new = train(1)
    monkeypatch.setenv("CATGAN_CACHE", str(machines[0]))
    with pytest.raises(UserError, match="s3://cats/runs/one holds no best generator"):
        open_source(RUN, None)
    capsys.readouterr()
    assert old != new == train(0)
    assert train(0) == new
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "was deleted since" in line]
    assert (Path(line.rpartition(": ")[2]) / best).read_bytes() == b"old"
    assert best not in storage._names()  # type: ignore[attr-defined]


def test_a_run_whose_first_upload_failed_is_continued(bucket: Callable[[bool], None]) -> None:
    storage = open_storage(RUN)
    storage.make()
    storage.write("outbox.jsonl", b"{}\n")
    bucket(True)
    with pytest.raises(OSError, match="Access Key Id you provided does not exist"):
        storage.push()
    bucket(False)
    assert open_storage(RUN).set_aside() is None
    assert (storage.work / "outbox.jsonl").is_file()
