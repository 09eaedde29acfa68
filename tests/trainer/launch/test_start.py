"""One training at a time in a run, and what the environment and memory have to say."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from catgan.command import UserError
from tests.trainer.launch.runs import OPTIONS, content, save_checkpoint
from trainer.checkpoints.storage import Storage
from trainer.distributed.context import LocalContext
from trainer.launch import driver, start, worker
from trainer.launch import ray as launch_ray
from trainer.launch.checks import problems
from trainer.launch.options import parse
from trainer.launch.start import only_training
from trainer.launch.worker import Job
from trainer.loop import Outcome
from trainer.recipes import resolve

TRAINING = """
import sys
from trainer.checkpoints.storage import Storage
from trainer.launch.start import only_training

with only_training(Storage(sys.argv[1])):
    print("training", flush=True)
    input()
"""


def test_one_training_at_a_time(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "_LOCK_SECONDS", 0.2)
    command = ["--data", str(shards), "--out", str(tmp_path), "--name", "a", "--workers", "0", *OPTIONS]
    pipe = subprocess.PIPE
    other = [sys.executable, "-c", TRAINING, str(tmp_path / "a")]
    with subprocess.Popen(other, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[3]) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"training\n"
            before = content(tmp_path)
            with pytest.raises(UserError, match=f"{tmp_path / 'a'} is being trained by another process"):
                driver.main(command)
            assert content(tmp_path) == before
            driver.main([*command, "--dry-run"])
        finally:
            first.kill()
        assert first.wait() == -signal.SIGKILL
    with only_training(Storage(tmp_path / "a")):
        assert len(content(tmp_path / "a")) == 1


def test_folders_of_a_lock_stay_only_if_something_else_is_in_them(tmp_path: Path):
    with only_training(Storage(tmp_path / "out" / "a")):
        pass
    assert content(tmp_path) == {}
    with only_training(Storage(tmp_path / "out" / "a")):
        (tmp_path / "out" / "mlflow.db").touch()
    assert list(content(tmp_path)) == [str(tmp_path / "out"), str(tmp_path / "out" / "mlflow.db")]


@pytest.mark.parametrize(("options", "experiment"), [([], "mine"), (["--track.experiment", "other"], "other")])
def test_mlflow_names_the_experiment_by_a_variable_of_its_own(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], experiment: str
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    plan = ["--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--dry-run", *options]
    assert driver.main(plan)["config"]["track"]["experiment"] == experiment


def test_an_experiment_given_by_its_number_is_not_ignored_in_silence(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "3")
    driver.main(["--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--dry-run"])
    assert "MLFLOW_EXPERIMENT_ID is not used" in capsys.readouterr().err


def test_options_without_effect_are_not_ignored_in_silence(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--dry-run"]
    driver.main([*plan, "--augment.policy", "translation", "--model.blocks", "4", "--grow.hold-kimg", "5"])
    said = capsys.readouterr().err
    assert "warning: --augment.policy translation has no effect with --augment.p 0" in said
    assert "warning: --model.blocks 4 has no effect with --model.arch dcgan: it is an option of r3gan" in said
    assert "warning: --grow.hold-kimg 5 has no effect with --model.arch dcgan: it is an option of progan" in said
    driver.main([*plan, "--augment.policy", "translation", "--augment.p", "0.5"])
    assert "no effect" not in capsys.readouterr().err
    more = ["--augment.target-kimg", "9", "--projected.lr", "1e-3", "--loss.no-r2"]
    driver.main([*plan, *more, "--optim.name", "rmsprop", "--optim.beta1", "0.9"])
    said = capsys.readouterr().err
    assert "warning: --augment.target-kimg 9 has no effect without --augment.target" in said
    assert "warning: --projected.lr 0.001 has no effect with --projected.weight 0" in said
    assert "warning: --loss.no-r2 has no effect with --loss.gamma 0" in said
    assert "warning: --optim.beta1 0.9 has no effect with --optim.name rmsprop" in said


def test_a_second_discriminator_that_would_join_after_the_end_is_named(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
):
    plan = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--dry-run"]
    driver.main([*plan, "--projected.weight", "3", "--projected.start-kimg", "40", "--kimg", "30"])
    expected = "--projected.weight 3 has no effect with --kimg 30: the second discriminator joins after 40 kimg"
    assert expected in capsys.readouterr().err


def test_the_best_metric_of_another_run_does_not_count(shards: Path, tmp_path: Path):
    """Else a training that starts from a run which has ended by its patience would count as complete."""
    save_checkpoint(tmp_path / "a", shards, 64)
    for name, has_best in (("a", True), ("b", False)):
        argv = [*OPTIONS, "--resume", str(tmp_path / "a"), "--kimg", "1"]
        options = parse(argv, resolve("dcgan-cpu-32", None, gpu=False), "")
        position = start.find_start(options, Storage(tmp_path / name)).position
        assert position.nimg == 64
        assert (position.best is not None) == (position.last_metric is not None) == has_best


def test_options_that_differ_from_the_checkpoints_are_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_checkpoint(tmp_path / "a", shards, 64)
    for words, expected in (
        ([], ""),
        (["--batch", "32", "--kimg", "7"], "--batch 8, now 32; --kimg 100, now 7\n"),
        (["--track.uri", "http://me:secret@h:1"], "--track.uri None, now http://h:1\n"),
    ):
        options = parse([*OPTIONS, *words], resolve("dcgan-cpu-32", None, gpu=False), "")
        start.find_start(options, Storage(tmp_path / "a"))
        said = capsys.readouterr().err
        assert said.startswith("options that have changed since ") == bool(expected)
        assert said.endswith(expected)


def test_a_complete_run_starts_no_ray(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path / "a", shards, 64)
    jobs: list[Job] = []

    def run_in_process(job: Job) -> Outcome:
        jobs.append(job)
        raise UserError("the end")

    monkeypatch.setattr(driver, "run_in_process", run_in_process)
    command = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "2", *OPTIONS]
    with pytest.raises(UserError, match="the end"):
        driver.main([*command, "--name", "a", "--kimg", "0.064"])
    assert len(jobs) == 1


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "the memory of the GPU"),
        (RuntimeError("CUDA error: out of memory"), "the memory of the GPU"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory of this machine"),
        (MemoryError(), "the memory of this machine"),
    ],
)
def test_too_little_memory_is_one_line_with_advice(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
):
    def train(*_: object) -> Outcome:
        raise error

    monkeypatch.setattr(worker, "train", train)
    command = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", *OPTIONS]
    with pytest.raises(UserError, match=r"--accumulate 2 --loss.no-share-batch") as caught:
        driver.main(command)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["dcgan-cpu-32", "dcgan-cpu-64", "r3gan-64", "stylegan2-64"])
def test_the_advice_on_memory_is_accepted(recipe: str):
    config = resolve(recipe, None, gpu=True)
    advice = worker._advice_on_memory(config, LocalContext(), MemoryError())
    assert "a smaller --batch" in advice
    for words in re.findall(r"process it in parts \((.*?)\)", advice):
        assert problems(parse(words.split(), config, "").config()) == []


def test_other_errors_of_a_worker_stay_what_they_are(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def train(*_: object) -> Outcome:
        raise RuntimeError("a bug")

    monkeypatch.setattr(worker, "train", train)
    command = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", *OPTIONS]
    with pytest.raises(RuntimeError, match="a bug"):
        driver.main(command)


def test_threads_that_other_processes_will_hold_up(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plan = ["--data", str(shards), "--out", str(tmp_path), "--dry-run", "--workers"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for workers, chosen, load, is_warned in (
        ("0", False, 1.5, True),
        ("0", False, 0.5, False),
        ("0", True, 1.5, False),
        ("2", False, 1.5, False),  # with one thread each
    ):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if chosen:
            monkeypatch.setenv("OMP_NUM_THREADS", "2")
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        driver.main([*plan, workers])
        assert ("OMP_NUM_THREADS=1 is probably faster" in capsys.readouterr().err) == is_warned


def test_workers_of_this_machine_have_no_more_threads_than_the_user_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert launch_ray._max_threads() == 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a job: Ray sets the variable for its driver
    assert launch_ray._max_threads() is None
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch_ray._max_threads() is None
