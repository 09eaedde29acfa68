"""Runs and data sets given to ``catfid``: a run means its best generator, and sheets are never single images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from infer.session import Generator
from trainer.data.build.shards import write_shards
from trainer.metrics.catfid.sides import ImageSet, generator_of_run, is_trained_on_efflite0, open_side


def side(path: Path | str) -> ImageSet:
    found = open_side(generator_of_run(str(path)), split=None, num=5, seed=0)
    assert isinstance(found, ImageSet)
    return found


@pytest.fixture
def run(tmp_path: Path, generator_file: Path) -> Path:
    """The folder of a training that has ended."""
    run = tmp_path / "runs" / "mine"
    for folder in ("samples", "best", "checkpoint_000000000064"):
        (run / folder).mkdir(parents=True)
    sheet = Image.new("RGB", (64, 64), "red")
    for name in ("reals.png", "progress.gif", "samples/fakes_000000kimg.png", "best/samples.png"):
        sheet.save(run / name)
    for name in ("config.json", "metrics.jsonl", "best/card.md", "best/gen.safetensors"):
        (run / name).write_text("{}")
    shutil.copy(generator_file, run / "best" / "gen.onnx")
    return run


def test_a_run_means_its_best_generator(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run, run / "best", f"{run.parent}/nope/../mine"):
        found = side(path)
        assert (found.kind, found.count, found.size) == ("onnx", 5, (16, 16))
        assert isinstance(found.generator, Generator)
        line = f"{run} is a training run: taking its best generator, {run}/best/gen.onnx\n"
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"discriminator_network": "efflite0", "metric": "fid50k"}, True),
        ({"metric": "fd2k_opennsfw"}, True),  # of an earlier version
        ({"metric": "fd2k_efflite0"}, False),
        ({}, False),
    ],
)
def test_generators_that_were_trained_on_efflite0(entries: dict[str, str], expected: bool) -> None:
    generator = cast(Generator, SimpleNamespace(metadata=entries))
    images = ImageSet("onnx", 1, (8, 8), lambda: iter(()), generator=generator)
    assert is_trained_on_efflite0(images) == expected
    assert not is_trained_on_efflite0(replace(images, generator=None))


def test_a_run_without_a_generator_is_refused(run: Path) -> None:
    (run / "best" / "gen.onnx").unlink()
    for path in (run, run / "best"):
        with pytest.raises(UserError, match=r"mine is a training run without best/gen\.onnx: `catexport"):
            side(path)


def test_folders_of_sample_grids_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"samples is part of the training run in .*mine, .*: give .*mine"):
        side(run / "samples")


def test_sheets_below_a_folder_are_passed_over_in_one_line(
    run: Path, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder("photos", 3)
    shutil.move(run, folder / "run")
    write_shards(folder / "set", ((np.zeros((16, 16, 3), np.uint8), {}) for _ in range(3)), size=16)
    Image.new("RGB", (16, 16)).save(folder / "contact.png")  # the user's own
    capsys.readouterr()
    assert side(folder).count == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder}/run (training run)" in line
    assert f"{folder}/set (data set)" in line


def test_a_folder_of_runs_has_no_images(run: Path) -> None:
    with pytest.raises(UserError, match="runs has no images"):
        side(run.parent)
