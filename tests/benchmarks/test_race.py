"""The race at tiny sizes: what its clock counts, in which order it trains, what it keeps, whom it lets in."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from catgan.command import UserError
from trainer.data.build.shards import write_shards
from trainer.data.build.verify import verify
from trainer.data.drawn.synth import draw_many
from trainer.data.images import to_square
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images

Script = Callable[[str], ModuleType]


class Clock(Protocol):
    now: float


class Toy:
    """An extractor: mean and spread of each colour."""

    name, dim, weights_sha256, resize = "toy", 6, "0" * 64, "none"
    device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


class Judge:
    """Every picture is as far away as the last one, plus one; judging takes time."""

    evaluations, seconds = 0, 0.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def prepare(self) -> None:
        self.clock.now += 1000.0

    def measure(self, pictures: Callable[[Sequence[int]], Tensor]) -> dict[str, float]:
        return {"distance": self.distance(pictures), "kid": 0.5, "precision": 0.25, "recall": 0.125}

    def distance(self, pictures: Callable[[Sequence[int]], Tensor]) -> float:
        self.clock.now += 1000.0
        self.evaluations += 1
        return float(pictures(range(2)).float().mean()) + self.evaluations


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Script) -> ModuleType:
    """The script with a cache of its own and the toy extractor; the number of threads is the tests' business."""
    race = script("race")
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(race, "choose_extractor", lambda name: Toy())
    monkeypatch.setattr(race, "device", lambda: torch.device("cpu"))
    return race


def grey(seeds: Sequence[int]) -> Tensor:
    return torch.full((len(seeds), 3, 4, 4), 7, dtype=torch.uint8)


def test_the_clock_counts_training_only(script: Script, clock: Clock, tmp_path: Path) -> None:
    training = script("race_training")
    seen: list[int] = []
    settled: list[float] = []

    def step(nimg: int) -> None:
        seen.append(nimg)
        clock.now += 1.0

    contestant = training.Contestant(8, step, lambda: settled.append(clock.now), average=grey, live=grey)
    result = training.train(contestant, "tiny", 1.0, 3, Judge(clock), lambda i: tmp_path / f"{i}.png")
    assert seen == list(range(0, 60 * 8, 8))
    assert settled == [20.0, 2040.0, 4060.0], "once before each pair of evaluations"
    assert [point["minutes"] for point in result["curve"]] == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-3)
    assert [(point["distance"], point["distance_live"]) for point in result["curve"]] == [(8, 9), (10, 11), (12, 13)]
    assert {key: result[key] for key in ("images_per_second", "kimg", "seconds")} == {
        "images_per_second": 8.0,
        "kimg": 0.48,
        "seconds": 60.0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "3.png"]


def test_live_and_average_of_the_plain_loop(script: Script) -> None:
    pictures = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8)
    plain = script("race_training").plain_contestant(pictures, torch.device("cpu"))
    first = plain.average(range(3))
    assert (first.shape, first.dtype) == ((3, 3, 16, 16), torch.uint8)
    for nimg in range(0, 3 * plain.batch, plain.batch):
        plain.step(nimg)
    before = torch.get_rng_state()
    plain.settle()
    assert torch.equal(torch.get_rng_state(), before)
    average = plain.average(range(3))
    plain.settle()
    assert torch.equal(plain.average(range(3)), average)
    assert not torch.equal(plain.live(range(3)), plain.average(range(3)))
    assert torch.equal(plain.live(range(3))[1:], plain.live(range(1, 3))), "running statistics, not the batch's"


HEADER = {
    "metric": "fd8_toy",
    "split": "train",
    "n_real": 86,
    "minutes": 1.0,
    "size": 16,
    "seeds": 3,
    "dataset_digest": "d",
    "machine": "m",
}


def result(distance: float, live: float | None = 1.0) -> dict[str, Any]:
    points = [
        {"minutes": i / 2, "kimg": i, "distance": distance / i, "kid": 0.5, "precision": 0.2, "recall": 0.1}
        for i in (1, 2)
    ]
    curve = [point | {"distance_live": live} for point in points]
    return {"curve": curve, "images_per_second": 10 * distance, "kimg": 2, "seconds": 60.0}


def entrants(script: Script, ran: list[tuple[str, int]], names: str = "abc", fails: str = "") -> list[Any]:
    def run(name: str, seed: int, label: str) -> dict[str, Any]:
        ran.append((name, seed))
        if name in fails and seed == 1:
            raise UserError(f"{label}: broke")
        return result(100.0 + seed)

    make = script("race_schedule").Entrant
    return [make(name, {"lr": (1, 2)}, lambda seed, label, name=name: run(name, seed, label)) for name in names]


@pytest.fixture
def race_of(script: Script, clock: Clock, tmp_path: Path) -> Callable[..., Any]:
    def run(made: list[Any], **changes: Any) -> tuple[Any, list[str]]:
        race = script("race_schedule").Race(made, HEADER | changes, 2, 8, tmp_path)
        return race, race.run(Judge(clock))

    return run


def test_the_order_turns_round_from_seed_to_seed(script: Script, race_of: Callable[..., Any]) -> None:
    ran: list[tuple[str, int]] = []
    race_of(entrants(script, ran))
    assert "".join(name for name, _ in ran) == "abccbaabc"
    assert [seed for _, seed in ran] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_race_that_was_cut_off_continues(script: Script, race_of: Callable[..., Any], tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []
    made = entrants(script, ran)

    def stop(seed: int, label: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race_of([*made[:2], script("race_schedule").Entrant("c", {"lr": [1, 2]}, stop)])
    assert ran == [("a", 0), ("b", 0)]
    assert len(json.loads((tmp_path / "results.json").read_text())["trainings"]) == 2
    race, _ = race_of(made)
    assert ran[2:] == [("c", 0), ("c", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("c", 2)]
    assert [row["seeds"] for row in race.record()["results"]] == [3, 3, 3]
    race_of(made)
    assert len(ran) == 9, "all were finished"
    race_of(made, minutes=2.0)
    assert len(ran) == 18, "those of other minutes do not count"
    race, _ = race_of(made)
    assert len(ran) == 18, "but are kept"


def test_another_configuration_is_trained_anew(script: Script, race_of: Callable[..., Any]) -> None:
    ran: list[tuple[str, int]] = []
    made = entrants(script, ran, "a")
    race_of(made)
    race_of([script("race_schedule").Entrant("a", {"lr": (1, 3)}, made[0].run)])
    assert len(ran) == 6


def test_who_fails_is_out_and_the_others_go_on(script: Script, race_of: Callable[..., Any]) -> None:
    ran: list[tuple[str, int]] = []
    race, failures = race_of(entrants(script, ran, fails="b"))
    assert failures == ["b seed 1: broke"]
    assert "".join(name for name, _ in ran) == "abccbaac"
    assert [(row["recipe"], row["seeds"]) for row in race.record()["results"]] == [("a", 3), ("b", 1), ("c", 3)]


def test_another_results_file_is_left_alone(race_of: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"trainings": [1]}')
    with pytest.raises(UserError, match="another --out"):
        race_of([])
    assert (tmp_path / "results.json").read_text() == '{"trainings": [1]}'


def test_rows_are_means_over_seeds(script: Script) -> None:
    row = script("race_report").mean_row("a", [result(90.0), result(100.0), result(122.0)])
    assert [point["distance"] for point in row["curve"]] == [104.0, 52.0]
    assert (row["distance"], row["distance_std"]) == (52.0, pytest.approx(np.std([45, 50, 61], ddof=1), abs=0.01))
    assert (row["images_per_second"], row["kimg"], row["kid"], row["seeds"]) == (1040.0, 2, 0.5, 3)
    alone = script("race_report").mean_row("a", [result(90.0, live=None)])
    assert (alone["distance"], alone["distance_std"], alone["distance_live"]) == (45.0, None, None)


def test_shrunk_shards_keep_splits_order_and_records(script: Script, tmp_path: Path) -> None:
    data = write_shards(tmp_path / "large", draw_many(3, 50, 32), size=32, val_fraction=0.3, seed=5)
    script("race_data").shrink(data, tmp_path / "small", 16)
    small = verify(tmp_path / "small")
    assert (small.size, small.seed) == (16, 5)
    for split in ("train", "val"):
        before, after = (torch.cat(list(eval_images(m, split))).permute(0, 2, 3, 1).numpy() for m in (data, small))
        expected = [np.asarray(to_square(Image.fromarray(picture), 16, "none")) for picture in before]
        np.testing.assert_array_equal(after, np.stack(expected))
    again = tmp_path / "again"
    script("race_data").shrink(data, again, 16)
    assert Manifest.load(again).digest == small.digest != data.digest


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "plain,dcgan-cp"], "did you mean dcgan-cpu"),
        (["--recipes", "dcgan-cpu,"], "empty name"),
        (["--recipes", "dcgan-cpu,dcgan-cpu-32"], "dcgan-cpu-32 would take part twice"),
        (["--recipes", "dcgan-cpu,dcgan-cpu-64"], "dcgan-cpu-64: the pictures are 32x32"),
        (["--size", "64"], "are 32x32: give 32 or less"),
        (["--size", "24"], "power of two"),
        (["--num", "3"], "at least 4"),
        (["--intervals", "0"], "whole number from 1"),
        (["--seeds", "x"], "whole number from 1"),
        (["--recipes", "plain", "--foreign", "plain=python"], "plain would take part twice"),
        (["--foreign", "python x.py"], "give NAME=COMMAND"),
        (["--foreign", "../a=python x.py"], "give NAME=COMMAND"),
        (["--foreign", "a=python 'x.py"], "cannot be split"),
        (["--foreign", "a=no-such-program-anywhere"], "no program 'no-such-program-anywhere'"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(
    world: ModuleType, shards: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        world.main(["--data", str(shards), "--out", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
data, out, seconds, seed, size, num = sys.argv[1:]
files = sorted(Path(data).glob("*.png"))
assert Image.open(files[0]).size == (int(size), int(size))
rng = np.random.default_rng(int(seed))
for i in range(int(num)):
    pixels = np.asarray(Image.open(files[i])) + rng.integers(0, 9, (int(size), int(size), 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(out, f"{i:04d}.png"))
Path(out, "progress.json").write_text(json.dumps({"images": 5000}))
print("trained for", seconds)
"""


def command(tmp_path: Path, code: str, *words: str) -> str:
    (tmp_path / "foreign.py").write_text(code)
    return f"theirs={shlex.join([sys.executable, str(tmp_path / 'foreign.py')])} {' '.join(words)}"


ALL = ("{data}", "{out}", "{seconds}", "{seed}", "{size}", "{num}")
TINY = ["--size", "16", "--recipes", "plain,dcgan-cpu", "--seeds", "2", "--intervals", "2", "--num", "12"]


def test_a_race_with_a_foreign_script(
    world: ModuleType, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--data", str(shards), *TINY, "--minutes", "0.002", "--out", str(out)]
    argv += ["--foreign", command(tmp_path, SCRIPT, *ALL)]
    record = world.main(argv)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "the val split holds 10, --num is 12" in printed.err
    json.dumps(record)
    assert {key: record[key] for key in ("metric", "split", "size", "seeds", "minutes", "out")} == {
        "metric": "fd12_toy",
        "split": "train",
        "size": 16,
        "seeds": 2,
        "minutes": 0.002,
        "out": str(out),
    }
    plain, recipe, theirs = record["results"]
    assert [row["recipe"] for row in record["results"]] == ["plain", "dcgan-cpu", "theirs"]
    for row in (plain, recipe):
        assert [point["minutes"] >= 0.001 * (i + 1) for i, point in enumerate(row["curve"])] == [True, True]
        assert row["distance"] > 0
        assert row["distance_live"] > 0
        assert row["distance_std"] >= 0
    (point,) = theirs["curve"]
    assert theirs["distance_live"] is None
    assert theirs["kimg"] == 5
    assert point["distance"] < min(plain["distance"], recipe["distance"]), "cats are nearer to cats than noise is"
    assert "trained for 0.12" in (out / "theirs-seed1.log").read_text()
    kept = json.loads((out / "results.json").read_text())
    assert kept["results"] == record["results"]
    assert len(kept["trainings"]) == 6
    scripts = [t for t in kept["trainings"] if t["settings"]["recipe"] == "theirs"]
    assert [t["images_per_second"] for t in scripts] == pytest.approx([5000 / t["seconds"] for t in scripts], rel=0.1)
    table = (out / "table.md").read_text().splitlines()
    assert table[4].startswith("| theirs | ")
    assert len(table) == 2 + 2 + 3
    with Image.open(out / "curves.png") as image:
        assert image.width > image.height
    sheets = {path.name for path in out.glob("*.png")} - {"curves.png"}
    ours = {f"{name}-seed{s}-{i:02d}.png" for name in ("plain", "dcgan-cpu") for s in (0, 1) for i in (1, 2)}
    assert sheets == ours | {"theirs-seed0-01.png", "theirs-seed1-01.png"}

    again = world.main(argv)
    assert again == record
    assert "6 of 6 trainings are finished already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('about to'); raise SystemExit('no such GPU')", r"status 1; its output in .*ends: .*no such GPU"),
        ("print('done')", r"left no gen.onnx and 0 PNG files in .*, needed are 12; .*ends: done"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"status -11; no output"),
        (SCRIPT.replace(".save(", ".resize((8, 8)).save("), r"is 8x8"),
    ],
)
def test_a_foreign_script_that_fails_is_one_line(
    world: ModuleType, shards: Path, tmp_path: Path, code: str, message: str
) -> None:
    out = tmp_path / "out"
    argv = ["--data", str(shards), "--size", "16", "--recipes", "plain", "--seeds", "1", "--intervals", "1"]
    argv += ["--num", "12", "--minutes", "0.0001", "--out", str(out), "--foreign", command(tmp_path, code, *ALL)]
    with pytest.raises(UserError, match=message) as caught:
        world.main(argv)
    assert str(caught.value).startswith("theirs seed 0: ")
    assert "\n" not in str(caught.value)
    assert [row["recipe"] for row in json.loads((out / "results.json").read_text())["results"]] == ["plain"]
    assert (out / "table.md").is_file()


def test_a_script_that_takes_too_long_is_ended_with_its_children(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign = script("race_foreign")
    monkeypatch.setattr(foreign, "GRACE", 0.5)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    began = time.perf_counter()
    with pytest.raises(UserError, match="slow: the command was ended after 8 s; its output"):
        foreign._run([sys.executable, "-c", code], tmp_path / "log", limit=8.0, label="slow")
    assert time.perf_counter() - began < 40
    child = int((tmp_path / "log").read_text())
    for _ in range(100):
        if not _alive(child):
            return
        time.sleep(0.05)
    pytest.fail("the script's child outlived it")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_foreign_generator_file(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    foreign = script("race_foreign")

    class Fake:
        z_dim, size = 5, 16

        def __init__(self, path: Path, device: str) -> None:
            assert path == tmp_path / "gen.onnx"

        def __call__(self, z: np.ndarray) -> np.ndarray:
            assert z.shape[1] == 5
            return np.zeros((len(z), 16, 16, 3), np.uint8)

    monkeypatch.setattr(foreign, "Generator", Fake)
    (tmp_path / "gen.onnx").touch()
    pictures = foreign._open(tmp_path, 16, 4, "theirs", tmp_path / "log")
    assert pictures(range(3)).shape == (3, 3, 16, 16)
    with pytest.raises(UserError, match="makes 16x16, the race is 32x32"):
        foreign._open(tmp_path, 32, 4, "theirs", tmp_path / "log")


@pytest.mark.parametrize("text", ["{}", "[]", '{"images": true}', '{"images": 0}', "{", '{"images": "5"}'])
def test_a_damaged_progress_file_is_no_progress(script: Script, tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert script("race_foreign")._images(tmp_path) is None


def test_the_real_pictures_are_val_if_there_are_enough(script: Script, shards: Path) -> None:
    judge, manifest = script("race_judge"), Manifest.load(shards)
    num_val = manifest.splits["val"].images
    assert judge.choose_split(manifest, "auto", num_val) == "val"
    assert judge.choose_split(manifest, "auto", num_val + 1) == "train"
    assert judge.choose_split(manifest, "val", num_val + 1) == "val"
