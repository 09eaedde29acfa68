"""``catfid``: the kinds of sides, the JSON object, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from catgan.command import UserError
from infer.latents import latents
from infer.session import Generator
from tests.trainer.data import profiles
from trainer.data.build.shards import write_shards
from trainer.metrics.catfid import checks, command, measure
from trainer.metrics.catfid.cli import main
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.frechet import Gaussian


class Toy:
    """Features: mean and standard deviation of each channel."""

    name, dim, weights_sha256, resize = "toy", 6, "0" * 64, "none"
    device = torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) <= 64
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return 10 * features[:, :3]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    extractor = Toy()
    monkeypatch.setattr(command, "choose_extractor", lambda *_, **__: extractor)
    return extractor


@pytest.fixture
def low_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows FID of 100 images, so that tests need not make 2,048."""
    monkeypatch.setattr(checks, "MIN_FID", 100)


def test_two_folders(toy: Toy, low_minimum: None, make_folder: Callable[..., Path]):
    real, fake = make_folder("real", 150), make_folder("fake", 120, shift=50, seed=1)
    result = main([str(real), str(fake), "--seed", "5"])
    assert result["metrics"].keys() == {"fd120_toy", "kid120_toy"}
    assert result["metrics"]["fd120_toy"] == pytest.approx(3 * (50 / 255) ** 2, rel=0.05)
    assert result["metrics"]["kid120_toy"] > 10 * result["kid_std"] > 0
    expected = {"n_real": 150, "n_fake": 120, "extractor": "toy", "resize": "none", "seed": 5}
    assert expected.items() <= result.items()
    assert result["seconds"] > 0
    json.dumps(result)


def test_values_do_not_depend_on_the_progress_bar(
    toy: Toy, low_minimum: None, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """With TQDM_DISABLE=1 its count stays 0."""
    sides = [str(make_folder("real", 150)), str(make_folder("fake", 120, shift=50, seed=1))]
    command_line = [*sides, "--metrics", "fid,kid,pr,copies"]
    expected = main(command_line)
    monkeypatch.setattr(measure, "tqdm", partial(tqdm, disable=True))
    found = main(command_line)
    assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_the_distance_of_a_folder_from_itself_is_zero(toy: Toy, low_minimum: None, make_folder: Callable[..., Path]):
    folder = make_folder("real", 130)
    metrics = main([str(folder), str(folder)])["metrics"]
    assert metrics["fd130_toy"] < 1e-9
    assert metrics["kid130_toy"] < 1e-3


def test_folders_are_searched_recursively_and_other_files_are_ignored(toy: Toy, make_folder: Callable[..., Path]):
    folder = make_folder("real", 9)
    (folder / "inside").mkdir()
    Image.new("L", (16, 16)).save(folder / "inside" / "grey.JPEG")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"not an image")
    assert main([str(folder), str(folder)])["n_real"] == 10


def test_few_images_get_kid_only(toy: Toy, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    real, fake = make_folder("real", 40), make_folder("fake", 30, seed=1)
    assert main([str(real), str(fake)])["metrics"].keys() == {"kid30_toy"}
    assert "2,048" in capsys.readouterr().err


def test_shards_and_their_splits(toy: Toy, tmp_path: Path):
    rng = np.random.default_rng(0)
    images = ((rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), {}) for _ in range(90))
    shards = str(tmp_path / "shards")
    val = write_shards(shards, images, size=16, val_fraction=0.3).splits["val"].images
    assert val == 27
    counts = [main([shards, shards, *option])["n_real"] for option in ([], ["--split", "val"], ["--split", "train"])]
    assert counts == [90, 27, 63]


def test_a_generator_generates_the_images_of_its_seeds(
    toy: Toy, generator_file: Path, tmp_path: Path, make_folder: Callable[..., Path]
):
    generator = Generator(generator_file, "cpu")
    (tmp_path / "made").mkdir()
    for seed in range(3, 73):
        image = generator(latents([seed], generator.z_dim))[0]
        Image.fromarray(image).save(tmp_path / "made" / f"{seed}.png")
    real = str(make_folder("real", 80))
    generated = main([real, str(generator_file), "--num", "70", "--seed", "3"])
    saved = main([real, str(tmp_path / "made"), "--seed", "3"])
    assert generated["n_fake"] == saved["n_fake"] == 70
    assert generated["metrics"] == pytest.approx(saved["metrics"], rel=1e-9)
    assert main([real, str(generator_file), "--metrics", "kid"])["n_fake"] == 2048


def test_statistics_give_the_distance_of_their_images(
    toy: Toy, low_minimum: None, tmp_path: Path, make_folder: Callable[..., Path]
):
    real, fake = make_folder("real", 150), make_folder("fake", 120, seed=1)
    images = np.stack([np.asarray(Image.open(f)) for f in sorted(real.iterdir())])
    rows = np.concatenate([toy(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in np.array_split(images, 5)])
    np.savez(
        tmp_path / "real.npz", mu=rows.mean(0, dtype=np.float64), sigma=np.cov(rows.astype(np.float64), rowvar=False)
    )
    result = main([str(tmp_path / "real.npz"), str(fake)])
    assert result["n_real"] is None
    assert result["metrics"] == pytest.approx(main([str(real), str(fake), "--metrics", "fid"])["metrics"], rel=1e-6)


def test_the_command_prints_one_json_line(make_folder: Callable[..., Path]):
    """The whole command with EfficientNet-Lite0."""
    real, fake = make_folder("real", 12), make_folder("fake", 10, shift=50, seed=1)
    command = [sys.executable, "-m", "trainer.metrics.catfid.cli", str(real), str(fake), "--extractor", "efflite0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["metrics"]["kid10_efflite0"] > 0
    assert result["extractor"] == "efflite0"
    assert result["weights_sha256"].startswith("57934424")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "REAL"),
        ("real", "FAKE"),
        ("real fake --metrics vibes", "allowed are fid, kid, is, pr, cats, copies, ppl"),
        ("real fake --metrics fid,lpips", "'lpips' is given, allowed are fid, kid, is"),
        ("real fake --metrics", "--metrics"),
        ("real fake --bogus 1", "--bogus"),
        ("real fake --num 0", "--num: '0' is given, allowed is a whole number from 2"),
        ("real fake --seed -1", "--seed"),
        ("real fake --seed one", "'one' is given"),
        ("real fake --extractor vgg", "efflite0"),
        ("real fake --num 30", "neither side is a gen.onnx"),
        ("real fake --split val", "neither side is a folder of shards"),
        ("real fake --metrics fid", "at least 2,048 images, FAKE has 20: add images, or use --metrics kid"),
        ("real fake --weights none.pth", "none.pth"),
        ("real fake --weights real/00000.png", "not a weights file"),
        ("real fake --extractor inception", "no Inception weights"),
        ("real fake --extractor efflite0 --weights real/00000.png", "leave one"),
        ("real none", "none does not exist"),
        ("none fake", "none does not exist"),
        ("real empty", "empty has no images"),
        ("real large", "REAL is 16x16, FAKE is 32x32"),
        ("real mixed", "a.png is 32x32"),
        ("real broken", "00000.png cannot be read"),
        ("real one", "REAL has 20 images, FAKE has 1"),
        ("real notes.txt", "notes.txt is none of"),
        ("real broken.onnx", "broken.onnx"),
        ("broken.npz fake", "broken.npz"),
        ("good.npz fake --metrics kid", "kid: the images of both sides"),
        ("real good.npz", "number of images"),
        ("good.npz large.npz", "have 5 dimensions"),
        ("real fake --metrics ppl", "FAKE must be a gen.onnx, fake is not"),
        ("real fake --repeat 5", "FAKE must be a gen.onnx, fake is not; for other images use --interval"),
        ("real fake --repeat 5 --against fake", "--repeat cannot be combined"),
        ("real fake --interval --metrics is", "is: intervals exist for fid and kid only"),
        ("real fake --against one", "at least 2 of each"),
        ("real fake --against large", "OTHER is 32x32"),
        ("real fake --against broken", "cannot be read as an image"),
        ("good.npz large.npz --interval", "large.npz has statistics only"),
        ("real --save-stats real.txt", "must end in .npz"),
        ("real --save-stats no/real.npz", "its folder does not exist"),
        ("real --save-stats x.npz --metrics fid", "need FAKE"),
    ],
)
def test_mistakes(
    arguments: str, message: str, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, num, size in (("real", 20, 16), ("fake", 20, 16), ("large", 20, 32), ("mixed", 2, 16), ("one", 1, 16)):
        make_folder(name, num, size)
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "a.png")
    make_folder("empty", 0)
    make_folder("broken", 2)
    (tmp_path / "broken" / "00000.png").write_bytes(b"not an image")
    for name in ("notes.txt", "broken.onnx", "broken.npz"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "good.npz", mu=np.zeros(5), sigma=np.eye(5))
    Gaussian(np.zeros(5), np.eye(5), 5000).save(tmp_path / "large.npz")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(arguments.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path):
    command = [sys.executable, "-m", "trainer.metrics.catfid.cli", str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("catfid: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_has_examples_and_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--extractor" in text


def test_all_metrics_and_their_names(
    toy: Toy, low_minimum: None, make_folder: Callable[..., Path], monkeypatch, tmp_path: Path
):
    def classify(images: torch.Tensor) -> torch.Tensor:
        """Dark images are cats."""
        cat = (images.float().mean((1, 2, 3)) < 120).float()
        return torch.nn.functional.one_hot(torch.where(cat.bool(), 281, 207), 1000).float()

    monkeypatch.setattr(command, "imagenet_classifier", lambda: classify)
    real, fake = make_folder("real", 150), make_folder("fake", 120, shift=50, seed=1)
    result = main([str(real), str(fake), "--metrics", "fid,kid,is,pr,cats,copies"])
    of_toy = {"fd120", "kid120", "is120", "precision120", "recall120", "density120", "coverage120", "authenticity120"}
    assert result["metrics"].keys() == {f"{name}_toy" for name in of_toy} | {"cats120"}
    metrics = result["metrics"]
    assert metrics["cats120"] == 0.0
    assert result["cats_real"] == 1.0
    assert metrics["precision120_toy"] == metrics["coverage120_toy"] == 0.0
    assert metrics["authenticity120_toy"] == 1.0
    assert metrics["is120_toy"] >= 1
    itself = main([str(real), str(real), "--metrics", "pr,copies"])["metrics"]
    assert itself["precision150_toy"] == itself["coverage150_toy"] == 1.0
    assert itself["authenticity150_toy"] == 0.0


def test_the_sheet_shows_copies_beside_their_originals(toy: Toy, make_folder: Callable[..., Path], tmp_path: Path):
    real = make_folder("real", 40)
    fake = tmp_path / "fake"
    fake.mkdir()
    for name in ("00031", "00007"):
        (fake / f"{name}.png").write_bytes((real / f"{name}.png").read_bytes())
    sheet = tmp_path / "sheet.png"
    result = main([str(real), str(fake), "--metrics", "copies", "--neighbours", str(sheet)])
    assert result["neighbours"] == str(sheet)
    with Image.open(sheet) as image:
        assert image.size == (7 * 16, 2 * 16)
        for row in range(2):
            tiles = [np.asarray(image.crop((16 * c, 16 * row, 16 * c + 16, 16 * row + 16))) for c in range(7)]
            assert (tiles[1] == 255).all()
            assert (tiles[0] == tiles[2]).all()
            assert not (tiles[0] == tiles[3]).all()
    with pytest.raises(UserError, match="--neighbours"):
        main([str(real), str(fake), "--neighbours", str(sheet)])
    with pytest.raises(UserError, match="its folder does not exist"):
        main([str(real), str(fake), "--metrics", "copies", "--neighbours", str(tmp_path / "no" / "x.png")])


@pytest.mark.parametrize(("metrics", "needed"), [("is", "10 generated"), ("pr", "6 real and 4 generated")])
def test_too_few_images_for_a_metric(toy: Toy, make_folder: Callable[..., Path], metrics: str, needed: str):
    with pytest.raises(UserError, match=needed):
        main([str(make_folder("real", 5)), str(make_folder("fake", 9, seed=1)), "--metrics", metrics])


def test_force_allows_fid_of_few_images(
    toy: Toy, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(toy, "name", "inception", raising=False)
    real, fake = make_folder("real", 40), make_folder("fake", 30, seed=1)
    assert main([str(real), str(fake), "--force", "--metrics", "fid"])["metrics"].keys() == {"fid30"}
    assert "warning: the Fréchet distance of only 30 images" in capsys.readouterr().err


def test_saved_statistics_are_read_by_catfid_and_pytorch_fid(
    toy: Toy, tmp_path: Path, make_folder: Callable[..., Path]
):
    from pytorch_fid.fid_score import calculate_frechet_distance, compute_statistics_of_path

    statistics = []
    for name, shift in (("real", 0), ("fake", 30)):
        folder, path = make_folder(name, 60, shift=shift, seed=shift), tmp_path / f"{name}.npz"
        result = main([str(folder), "--save-stats", str(path)])
        assert (result["metrics"], result["save_stats"], result["n_fake"]) == ({}, str(path), None)
        statistics += compute_statistics_of_path(str(path), None, 1, 6, "cpu")
    value = main([str(tmp_path / "real.npz"), str(tmp_path / "fake"), "--force"])["metrics"]["fd60_toy"]
    assert value == pytest.approx(calculate_frechet_distance(*statistics), rel=1e-4)


def test_against_tells_noise_from_a_difference(
    toy: Toy, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    real, good = make_folder("real", 80), make_folder("good", 60, shift=2, seed=1)
    alike, bad = make_folder("alike", 60, shift=2, seed=2), make_folder("bad", 60, shift=40, seed=3)
    verdicts = {}
    for other in (alike, bad):
        result = main([str(real), str(good), "--against", str(other), "--force"])
        assert result["metrics"].keys() == result["against"]["metrics"].keys() == result["interval95"].keys()
        for name, found in result["against"]["difference"].items():
            assert found["difference"] == result["metrics"][name] - result["against"]["metrics"][name]
            assert found["interval"][0] < found["difference"] < found["interval"][1]
            verdicts[other.name, name] = found["more_than_noise"]
        messages = capsys.readouterr().err
        json.dumps(result)
    assert "fd60_toy: FAKE is better than OTHER by" in messages
    assert verdicts[("bad", "fd60_toy")]
    assert verdicts[("bad", "kid60_toy")]
    assert not verdicts[("alike", "fd60_toy")]


def test_repeats_use_seeds_that_do_not_overlap(toy: Toy, generator_file: Path, make_folder: Callable[..., Path]):
    real = str(make_folder("real", 40))
    result = main([real, str(generator_file), "--num", "30", "--metrics", "is,kid", "--repeat", "3"])
    alone = [
        main([real, str(generator_file), "--num", "30", "--metrics", "is", "--seed", s]) for s in ("0", "30", "60")
    ]
    values = [run["metrics"]["is30_toy"] for run in alone]
    assert [run["is30_toy"] for run in result["repeats"]] == values
    assert result["metrics"]["is30_toy"] == pytest.approx(np.mean(values))
    assert result["std"]["is30_toy"] == pytest.approx(np.std(values, ddof=1))


def test_path_length_reads_no_real_images(toy: Toy, generator_file: Path, make_folder: Callable[..., Path]):
    folder = make_folder("real", 3)
    (folder / "00002.png").write_bytes(b"never read")
    command = [str(folder), str(generator_file), "--metrics", "ppl", "--num", "20"]
    result = main(command)
    assert result["metrics"].keys() == {"ppl20_toy"}
    assert 0 < result["metrics"]["ppl20_toy"] == main(command)["metrics"]["ppl20_toy"]


def test_statistics_of_shards_are_cached_for_fid(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Callable[..., Path]
):
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    images = ((rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), {}) for _ in range(50))
    shards = write_shards(str(tmp_path / "shards"), images, size=16, val_fraction=0.2)
    command = [str(tmp_path / "shards"), str(make_folder("fake", 30)), "--metrics", "fid", "--force"]
    first = [main([*command, *split])["metrics"] for split in ([], ["--split", "train"])]
    for shard in (tmp_path / "shards").rglob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))  # unreadable, but of the right length
    assert [main([*command, *split])["metrics"] for split in ([], ["--split", "train"])] == first
    assert first[0] != first[1]
    evaluator = Evaluator(toy, shards, num_fake=30)
    monkeypatch.setattr(Toy, "__call__", lambda *_: pytest.fail("training uses the same cache"))
    evaluator.prepare()


def test_a_run_is_evaluated_by_its_generator(
    toy: Toy, generator_file: Path, tmp_path: Path, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    generator_file.rename(best / "gen.onnx")
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    options = ["--num", "50", "--repeat", "2"]
    result = main([str(make_folder("real", 80)), str(tmp_path / "run"), *options])
    assert capsys.readouterr().err.count("is a training run: taking its best generator") == 1
    assert result["n_fake"] == 50
    assert main([str(tmp_path / "real"), str(best / "gen.onnx"), *options])["metrics"] == result["metrics"]


def test_folders_are_read_in_srgb(toy: Toy, low_minimum: None, tmp_path: Path) -> None:
    """The same photos, in sRGB and with red and blue exchanged by their profile, have the same statistics."""
    folders = tmp_path / "srgb", tmp_path / "swapped"
    for folder in folders:
        folder.mkdir()
    for seed in range(120):
        photo = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        photo.save(folders[0] / f"{seed}.png")
        stored = Image.merge("RGB", photo.split()[::-1])
        stored.save(folders[1] / f"{seed}.png", icc_profile=profiles.SWAPPED)
    metrics = main([*map(str, folders)])["metrics"]
    assert metrics["fd120_toy"] < 1e-4
