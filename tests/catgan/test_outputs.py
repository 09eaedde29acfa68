"""Folders that this project's commands wrote are known by files that only they hold together."""

from __future__ import annotations

from pathlib import Path

import pytest

from catgan.outputs import OwnFiles, in_words, own_files, owner

DATA_SET = {"manifest.json", "train-000000.tar", "val-000000.tar", "contact.png", "rejected.png", "rejected.csv"}
RUN = {"config.json", "metrics.jsonl", "reals.png", "progress.gif", "samples", "best", "checkpoint_000000000064"}
OTHERS = {
    "DATA_SET": ("data set", DATA_SET),
    "one split": ("data set", {"manifest.json", "train-000000.tar"}),
    "unfinished": ("unfinished data set", {"work.sqlite", "train-000000.tar"}),
    "run": ("training run", RUN),
    "run that has just begun": ("training run", {"config.json", "outbox.jsonl", "reals.png", "samples"}),
    "best": ("exported generator", {"card.md", "gen.onnx", "samples.png", "gen.safetensors"}),
    "runs": ("MLflow store", {"mlflow.db", "mlartifacts"}),
}


@pytest.mark.parametrize(("kind", "names"), OTHERS.values(), ids=OTHERS)
def test_own_files_are_told_from_others_beside_them(kind: str, names: set[str]) -> None:
    assert own_files({*names, "cat.jpg", "more"}) == dict.fromkeys(names, kind)


@pytest.mark.parametrize(
    "names",
    [
        {"contact.png", "reals.png", "rejected.png", "progress.gif", "samples", "samples.png"},
        {"manifest.json", "contact.png", "app.js"},  # of a web page
        {"config.json", "samples", "model.pt"},  # of another program
        {"train-000000.tar", "contact.png"},
    ],
)
def test_names_alone_decide_nothing(names: set[str]) -> None:
    assert own_files(names) == {}


def test_paths_of_an_archive_in_any_order() -> None:
    own = OwnFiles()
    paths = ["a/contact.png", "contact.png", "a/val-000000.tar", "a/cat.jpg", "a/manifest.json", "r/samples/x/1.png"]
    assert [own.note(path) for path in paths] == [True, True, True, False, True, True]
    own.note("r/config.json")
    own.note("r/metrics.jsonl")
    assert own.owner("a/contact.png") == ("a", "data set")
    assert own.owner("r/samples/x/1.png") == ("r", "training run")
    assert own.owner("contact.png") is None
    assert own.owner("a/cat.jpg") is None


def test_owner_of_a_path_on_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "samples/fakes.png", "mine.png"):
        (run / name).touch()
    assert owner(run / "samples") == owner(run / "samples" / "fakes.png") == (run, "training run")
    assert owner(run) is owner(run / "mine.png") is owner(tmp_path) is owner(Path("/")) is None


def test_many_folders_are_cut_in_messages() -> None:
    assert in_words({"a/set": "data set"}) == "a/set (data set)"
    assert in_words(dict.fromkeys("abcde", "data set")) == "a (data set), b (data set), c (data set) and 2 more"
