"""What can be refused is refused before anything is written, by ``--dry-run`` as by a training."""

import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from catgan.command import UserError
from tests.trainer.launch.runs import OPTIONS, content, save_checkpoint
from trainer.data.cli import main as catdata
from trainer.launch import driver
from trainer.launch.checks import problems
from trainer.launch.options import parse
from trainer.recipes import resolve
from trainer.tracking.outbox import Outbox

RECIPE = resolve("dcgan-cpu-32", None, gpu=False)


def refused(data: Path, out: Path, *arguments: object) -> str:
    """The message with which these arguments are refused, both by ``--dry-run`` and by a training; nothing in ``out``
    has changed."""
    before = content(out)
    command = ["dcgan-cpu-32", "--data", data, "--out", out, "--workers", "0", *OPTIONS, *arguments]
    messages = set()
    for more in (["--dry-run"], []):
        with pytest.raises(UserError) as caught:
            driver.main([str(word) for word in [*command, *more]])
        messages.add(str(caught.value))
        assert content(out) == before
    (message,) = messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "empty"),
        (" ", "blanks"),
        (" a", "blanks"),
        ("-", "other than -, . and .."),
        (".", "other than -, . and .."),
        ("..", "other than -, . and .."),
        ("a/b", "without slashes"),
        ("a\\b", "without slashes"),
        ("a\nb", "printable"),
        ("a\tb", "printable"),
        ("\x1b[31m", "printable"),
        ("a\u2028b", "printable"),
        ("a\udcff", "printable"),
        ("x" * 251, "at most 250 bytes"),
        ("ж" * 126, "at most 250 bytes"),
    ],
)
def test_names_of_runs(shards: Path, tmp_path: Path, name: str, part: str):
    message = refused(shards, tmp_path, "--name", name)
    assert "--name" in message
    assert part in message


@pytest.mark.parametrize("name", ["a", "my run", "Кот", "a.b-c_d", ".a", "猫" * 80])
def test_usual_names_of_runs(shards: Path, tmp_path: Path, name: str):
    command = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", "--dry-run"]
    assert driver.main([*command, "--name", name])["run_dir"] == str(tmp_path / name)


def numeric_options(group: object = RECIPE, prefix: str = "--") -> dict[str, type]:
    """The options that are numbers, and their types."""
    found: dict[str, type] = {}
    for field in fields(group):  # type: ignore[arg-type]
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(group, field.name)
        if is_dataclass(value):
            found |= numeric_options(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = type(value)
    return found


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e300", "-1e300"])
def test_numbers_that_are_not_finite_or_beyond_all_use(value: str):
    options = [name for name, kind in numeric_options().items() if kind is float]
    assert len(options) > 30
    words = [word for name in options for word in (name, value)]
    found = problems(parse(words, RECIPE, "").config())
    for name in options:
        option = name.rpartition(".")[0] if is_part(name) else name
        assert any(problem.startswith(f"{option} ") for problem in found), name


def is_part(option: str) -> bool:
    """Whether the option is a part of a schedule."""
    return option.endswith((".start", ".end", ".kimg"))


@pytest.mark.parametrize("name", [name for name in numeric_options() if not is_part(name)])
def test_no_number_may_be_negative(name: str):
    assert problems(parse([f"{name}=-1"], RECIPE, "").config()), name


@pytest.mark.parametrize("interval", ["--kimg", "--track.tick-kimg", "--track.snapshot-kimg", "--eval.every"])
def test_no_interval_may_be_zero(interval: str):
    (problem, *_) = problems(parse([interval, "0"], RECIPE, "").config())
    assert problem.startswith(interval)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kimg", "inf"], ["--kimg inf"]),
        (["--optim.g-lr", "nan"], ["--optim.g-lr nan"]),
        (["--seed", "9223372036854775808"], ["--seed"]),
        (["--data", ""], ["--data: the value is empty"]),
        (["--data", "", "--track.model="], ["--track.model, --data: the value is empty"]),
        (["--track.model", "cats/best"], ["--track.model"]),
        (["--track.experiment", "a\nb"], ["--track.experiment"]),
        (["--track.uri", "file:/tmp/mlruns"], ["tracking URI"]),
        (["--eval.extractor", "efflite0", "--eval.weights", "x.pth"], ["--eval.weights"]),
        (["--eval.num", "2048", "--eval.weights", "/nowhere/x.pth"], ["no weights file at /nowhere/x.pth"]),
        (["--resume", "{tmp}/nothing"], ["--resume"]),
        (["--init-from", "{tmp}/nothing"], ["--init-from"]),
        (["--optim.freeze-d", "2"], ["--optim.freeze-d 2 without --init-from"]),
        (["--optim.freeze-d", "4"], ["--optim.freeze-d 4: the discriminator has 4 layers, of which at most 3"]),
        (["--optim.freeze-d", "1", "--model.arch", "progan"], ["--optim.freeze-d 1 with --model.arch progan"]),
    ],
)
def test_options(shards: Path, tmp_path: Path, arguments: list[str], parts: list[str]):
    message = refused(shards, tmp_path, *(word.format(tmp=tmp_path) for word in arguments))
    for part in parts:
        assert part in message, message


def test_overfitting_cannot_be_measured_without_a_val_split(tmp_path: Path):
    catdata(["synth", str(tmp_path / "data"), "--num", "8", "--size", "32", "--val-fraction", "0"])
    message = refused(tmp_path / "data", tmp_path, "--name", "a", "--stop.overfitting", "0.7")
    assert "--stop.overfitting 0.7" in message
    assert "has no val split" in message


def test_a_data_set_of_one_image(tmp_path: Path):
    catdata(["synth", str(tmp_path / "data"), "--num", "1", "--size", "32"])
    message = refused(tmp_path / "data", tmp_path, "--name", "a")
    assert "1 images in the train split, at least 2 are needed" in message


@pytest.mark.parametrize("variable", ["CATGAN_CACHE", "--out", "--loader.cache"])
def test_folders_that_cannot_be_written(shards: Path, tmp_path: Path, variable: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "below")
    if variable == "CATGAN_CACHE":
        monkeypatch.setenv(variable, folder)
    message = refused(shards, tmp_path, *([variable, folder] if variable.startswith("--") else []))
    assert f"{tmp_path / 'file'} (Not a directory)" in message
    assert variable in message


def test_a_dry_run_makes_no_folder(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache" / "deep"))
    driver.main(["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path / "out"), "--workers", "0", "--dry-run"])
    assert content(tmp_path) == {}


@pytest.mark.parametrize("option", ["--model.g-width", "--grow.start", "--optim.name"])
def test_options_that_do_not_fit_the_checkpoint(shards: Path, tmp_path: Path, option: str):
    own = save_checkpoint(tmp_path / "own", shards, 64)
    other = {"--model.g-width": "8", "--grow.start": "8", "--optim.name": "rmsprop"}[option]
    more = ["--kimg", "1", option, other]
    assert f"checkpoint {own} has another model" in refused(shards, tmp_path, "--name", "own", *more)
    assert f"checkpoint {own} has another model" in refused(shards, tmp_path, "--resume", tmp_path / "own", *more)


def test_damaged_checkpoints(shards: Path, tmp_path: Path):
    own = save_checkpoint(tmp_path / "own", shards, 64)
    (own / "state.pt").write_bytes(b"")
    assert "cannot be read" in refused(shards, tmp_path, "--name", "own", "--kimg", "1")
    assert "cannot be read" in refused(shards, tmp_path, "--name", "new", "--resume", tmp_path / "own")


def test_weights_that_fit_no_layer(shards: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "own", shards, 64)
    message = refused(shards, tmp_path, "--init-from", tmp_path / "own", "--model.arch", "r3gan", "--model.z-dim", "9")
    assert "no layer of it" in message


def test_nothing_left_to_train(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = save_checkpoint(tmp_path / "own", shards, 64)
    message = refused(shards, tmp_path, "--name", "new", "--resume", own, "--kimg", "0.05")
    assert f"--resume {own}: at 0.064 kimg and --kimg 0.05 there is nothing left to train" in message
    save_checkpoint(tmp_path / "early", shards, 64, is_evaluated=False)
    message = refused(shards, tmp_path, "--name", "early", "--kimg", "0.064")
    assert "has no evaluated generator, and at 0.064 kimg and --kimg 0.064 there is nothing left to train" in message

    plan = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", *OPTIONS, "--dry-run"]
    plan += ["--name", "own", "--kimg", "0.064"]
    assert driver.main(plan)["resume_from"] == str(own)
    assert f"{tmp_path / 'own'} has nothing left to train; its best generator is to be" in capsys.readouterr().err
    Outbox(tmp_path / "own").put({"kind": "status", "time": 1, "status": "FINISHED"})
    driver.main(plan)
    assert f"{tmp_path / 'own'} is finished; a larger --kimg trains it further" in capsys.readouterr().err


def test_a_metric_network_that_is_none(shards: Path, tmp_path: Path):
    weights = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, weights)
    message = refused(shards, tmp_path, "--eval.num", "2048", "--eval.weights", weights)
    assert f"{weights} does not hold the weights of" in message


def test_a_copied_run_is_read_as_its_own(shards: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "own", shards, 64)
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    plan = ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), "--workers", "0", *OPTIONS, "--dry-run"]
    assert driver.main([*plan, "--name", "copy", "--kimg", "1"])["resume_from"].startswith(str(tmp_path / "copy"))
