"""The race with tiny networks: what its clock counts, in which order it trains, and what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from PIL import Image
from torch import Tensor

from catgan.command import UserError
from catgan.dataset import Manifest, Split
from trainer.recipes import resolve

Script = Callable[[str], ModuleType]
Sample = Callable[[Sequence[int]], Tensor]


class Clock(Protocol):
    now: float

    def __call__(self) -> float: ...


class ColourExtractor:
    """A metric network without weights: mean and standard deviation of each colour."""

    name, dim, weights_sha256, resize = "colour", 6, "0" * 64, "none"
    device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


class SlowScores:
    """Each evaluation takes 1,000 seconds and returns 1 more than the last one."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.evaluations = clock, 0

    def measure(self, sample: Sample) -> dict[str, float]:
        return {
            "distance": self.distance(sample),
            "distance_second": 3.0,
            "kid": 0.5,
            "precision": 0.25,
            "recall": 0.125,
        }

    def distance(self, sample: Sample) -> float:
        self.clock.now += 1000.0
        self.evaluations += 1
        return float(sample(range(2)).float().mean()) + self.evaluations


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Script) -> ModuleType:
    """The script with a cache of its own and a metric network without weights; it sets no number of threads."""
    race = script("race")
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(race, "choose_extractor", lambda name: ColourExtractor())
    monkeypatch.setattr(race, "device", lambda: torch.device("cpu"))
    return race


def grey(seeds: Sequence[int]) -> Tensor:
    return torch.full((len(seeds), 3, 4, 4), 7, dtype=torch.uint8)


def test_clock_counts_training_only(
    script: Script, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = script("race_training")
    monkeypatch.setattr(training, "training_clock", clock)
    seen: list[int] = []
    recomputed: list[float] = []

    def step(nimg: int) -> None:
        seen.append(nimg)
        clock.now += 1.0

    contestant = training.Contestant(8, step, lambda: recomputed.append(clock.now), sample_ema=grey, sample_raw=grey)
    result = training.train(contestant, "tiny", 1.0, 3, SlowScores(clock), str(tmp_path / "tiny"))
    assert seen == list(range(0, 60 * 8, 8))
    assert recomputed == [20.0, 2040.0, 4060.0], "once before each pair of evaluations"
    assert [point["minutes"] for point in result["curve"]] == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-3)
    assert [(point["distance"], point["distance_live"]) for point in result["curve"]] == [(8, 9), (10, 11), (12, 13)]
    assert (result["images_per_second"], result["kimg"], result["seconds"]) == (8.0, 0.48, 60.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"tiny-0{i}.png" for i in (1, 2, 3)]


def test_plain_loop_has_raw_and_ema_images(script: Script) -> None:
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
    plain = script("race_training").plain_contestant(images)
    first = plain.sample_ema(range(3))
    assert (first.shape, first.dtype) == ((3, 3, 16, 16), torch.uint8)
    for nimg in range(0, 3 * plain.batch, plain.batch):
        plain.step(nimg)
    rng = torch.get_rng_state()
    plain.recompute_ema_statistics()
    assert torch.equal(torch.get_rng_state(), rng)
    ema = plain.sample_ema(range(3))
    plain.recompute_ema_statistics()
    assert torch.equal(plain.sample_ema(range(3)), ema)
    assert not torch.equal(plain.sample_raw(range(3)), ema)
    assert torch.equal(plain.sample_raw(range(3))[1:], plain.sample_raw(range(1, 3))), "running statistics"


def test_a_conditional_recipe_gets_the_classes_of_its_images(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    training = script("race_training")
    names = ("dark", "light")
    config = resolve("biggan-cpu", 32, gpu=False)
    config = replace(config, batch=8, model=replace(config.model, classes=names, g_width=4, d_width=4))
    labels = torch.arange(40) % 2
    images = (labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    seen = []
    step = training.GAN.step

    def remember(gan: Any, reals: Tensor, nimg: int, more: Any, classes: Tensor, more_classes: Any) -> Any:
        seen.append((reals[:, 0, 0, 0] > 0, classes > 0))
        return step(gan, reals, nimg, more, classes, more_classes)

    monkeypatch.setattr(training.GAN, "step", remember)
    split = Split((), class_counts=(30, 10))
    contestant = training.recipe_contestant(config, images, labels, split)
    contestant.step(0)
    contestant.step(8)
    assert len(seen) == 2
    assert all(torch.equal(light, classes) for light, classes in seen)
    contestant.recompute_ema_statistics()
    assert contestant.sample_ema(range(3)).shape == (3, 3, 32, 32)


def test_rows_are_medians_over_seeds_and_the_worst(script: Script) -> None:
    def training(distance: float) -> dict[str, Any]:
        point = {"distance_second": 2.0, "distance_live": 1.0, "kid": 0.5, "precision": 0.2, "recall": 0.1}
        curve = [{"minutes": i / 2, "kimg": i, "distance": distance / i} | point for i in (1, 2)]
        return {"curve": curve, "images_per_second": 10 * distance, "kimg": 2, "seconds": 60.0}

    row = script("race_report").median_row("a", [training(90.0), training(122.0), training(100.0)])
    assert [point["distance"] for point in row["curve"]] == [100.0, 50.0]
    assert (row["distance"], row["distance_worst"], row["distance_second"]) == (50.0, 61.0, 2.0)
    assert (row["images_per_second"], row["kimg"], row["kid"], row["seeds"]) == (1000.0, 2, 0.5, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "plain,dcgan-cp"], "did you mean dcgan-cpu"),
        (["--recipes", "dcgan-cpu,"], "empty name"),
        (["--recipes", "plain,plain"], "plain twice"),
        (["--recipes", "dcgan-cpu,dcgan-cpu-32"], "dcgan-cpu-32 twice"),
        (["--recipes", "dcgan-cpu,dcgan-cpu-64"], "dcgan-cpu-64: the images are 32x32"),
        (["--recipes", "dcgan-cpu,biggan-cpu"], "biggan-cpu-32 with --model.conditional needs images with classes"),
        (["--size", "16"], "--size is for drawn cats"),
        (["--num", "3"], "at least 4"),
        (["--intervals", "0"], "whole number from 1"),
        (["--minutes", "0"], "number from"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(
    race: ModuleType, shards: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        race.main(["--data", str(shards), "--out", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_another_results_file_is_left_alone(race: ModuleType, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"trainings": [1]}')
    with pytest.raises(UserError, match="another --out"):
        race.main(["--data", str(shards), "--recipes", "plain", "--num", "12", "--out", str(tmp_path)])
    assert (tmp_path / "results.json").read_text() == '{"trainings": [1]}'


@pytest.mark.slow
def test_interrupted_race_continues(
    race: ModuleType, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two recipes, two seeds, cut off after the first training; then the same command again, and once more."""
    out, started, start = tmp_path / "out", [], race._start

    def interrupt_second(config: Any, *rest: Any) -> Any:
        started.append((config.recipe if config else "plain", rest[-1]))
        if len(started) == 2:
            raise KeyboardInterrupt
        return start(config, *rest)

    monkeypatch.setattr(race, "_start", interrupt_second)
    argv = ["--data", str(shards), "--recipes", "plain,dcgan-cpu", "--seeds", "2", "--intervals", "2", "--num", "12"]
    argv += ["--minutes", "0.002", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        race.main(argv)
    assert len(json.loads((out / "results.json").read_text())["trainings"]) == 1
    record = race.main(argv)
    assert started[2:] == [("dcgan-cpu-32", 0), ("dcgan-cpu-32", 1), ("plain", 1)], "in reverse order with seed 1"
    assert race.main(argv) == record
    assert len(started) == 5, "all trainings were finished"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "evaluating against the train split, 86 images (val has 10, --num is 12)" in printed.err

    assert {key: record[key] for key in ("metric", "split", "size", "seeds", "minutes", "out")} == {
        "metric": "fd12_colour",
        "split": "train",
        "size": 32,
        "seeds": 2,
        "minutes": 0.002,
        "out": str(out),
    }
    assert [row["recipe"] for row in record["results"]] == ["plain", "dcgan-cpu"]
    for row in record["results"]:
        assert [point["minutes"] >= 0.001 * (i + 1) for i, point in enumerate(row["curve"])] == [True, True]
        assert row["distance"] > 0 < row["distance_live"]
        assert row["distance_worst"] >= row["distance"]
        assert row["distance_second"] > 0
    kept = json.loads((out / "results.json").read_text())
    assert kept["results"] == record["results"]
    assert len(kept["trainings"]) == 4
    assert len((out / "table.md").read_text().splitlines()) == 2 + 2 + 2
    with Image.open(out / "curves.png") as image:
        assert image.width > image.height
    sheets = {path.name for path in out.glob("*.png")} - {"curves.png"}
    assert sheets == {f"{name}-seed{s}-0{i}.png" for name in ("plain", "dcgan-cpu") for s in (0, 1) for i in (1, 2)}

    race.main([*argv, "--minutes", "0.001", "--seeds", "1"])
    assert len(started) == 7, "trainings of other minutes do not count"
    assert len(json.loads((out / "results.json").read_text())["trainings"]) == 6, "but are kept"


def test_val_split_is_used_if_it_is_large_enough(script: Script, shards: Path) -> None:
    choose_split, manifest = script("race_training").choose_split, Manifest.load(shards)
    num_val = manifest.splits["val"].images
    assert choose_split(manifest, "auto", num_val) == "val"
    assert choose_split(manifest, "auto", num_val + 1) == "train"
    assert choose_split(manifest, "val", num_val + 1) == "val"
