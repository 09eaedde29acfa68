"""The end of a worker: files that cannot be uploaded neither hide why a training ended, nor make a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from catgan.command import UserError
from trainer.checkpoints.storage import Storage
from trainer.distributed.context import LocalContext
from trainer.launch import worker
from trainer.launch.worker import Job
from trainer.recipes import resolve


class _Refusing(Storage):
    def push(self) -> None:
        raise OSError(5, "the bucket does not answer")


@pytest.fixture
def job(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(worker, "open_storage", _Refusing)
    monkeypatch.setattr(worker, "set_up_device", lambda *_: None)
    config = resolve("dcgan-cpu-32", None, gpu=False).to_dict()
    config["track"]["offline"] = True
    (tmp_path / "run").mkdir()
    return Job(config, str(shards), str(tmp_path / "run"), "", "offline-1", None)


@pytest.mark.parametrize("error", [UserError("the loss is not finite"), KeyboardInterrupt()])
def test_why_a_training_ended_is_not_hidden(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def ending(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "train", ending)
    with pytest.raises(type(error)) as caught:
        worker.work(job, LocalContext())
    assert caught.value is error
    assert f"warning: {job.location} lacks the latest files" in capsys.readouterr().err


def test_a_finished_training_whose_files_are_missing_in_the_bucket(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "train", lambda *_: "done")
    with pytest.raises(UserError, match=r"the training is done, but .*/run lacks the latest files .*repeat the same"):
        worker.work(job, LocalContext())
