"""`cattrain project`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from catgan.command import UserError
from export.generator import export_onnx, metadata, weights_sha256
from infer.cli import main as catinfer
from infer.latentfile import read_latent
from tests.trainer.project.test_search import SIZE, Z_DIM, network
from trainer.checkpoints.checkpoint import encode_generator, load_generator
from trainer.cli import main
from trainer.config import Config, ModelConfig
from trainer.project import command, search
from trainer.recipes import FAMILIES

INFO = {"recipe": "dcgan-16", "kimg": 1.0, "metric": None, "run_id": None, "dataset_digest": None}


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CANDIDATES", 8)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with released weights and their ONNX file."""
    from dataclasses import replace

    config: Config = replace(FAMILIES["dcgan"].make(32), model=ModelConfig(size=SIZE, z_dim=Z_DIM, g_width=8))
    info = {**INFO, "config": config.to_dict()}
    best = tmp_path_factory.mktemp("run") / "best"
    best.mkdir()
    (best / "gen.safetensors").write_bytes(encode_generator(network().state_dict(), info))
    export_onnx(load_generator(best)[0], best / "gen.onnx", metadata(info))
    return best.parent


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Wider than high, so that it is cropped."""
    random = np.random.default_rng(0)
    path = tmp_path / "photo.png"
    Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((60, 40)).save(path)
    return path


def project(*args: str | Path) -> dict[str, Any]:
    return main(["project", *map(str, args)])


def test_the_files_and_catinfers_image_of_them(run_dir: Path, photo: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new"
    result = project(run_dir, photo, "--starts", 2, "--steps", 4, "--film", "gif", "--out", out)
    json.dumps(result)
    (one,) = result["photos"]
    assert sorted(p.name for p in out.iterdir()) == ["photo.latent.npz", "photo.projected.png", "photo.search.gif"]
    assert one["loss"] <= one["nearest_seed_loss"]
    assert "loss" in capsys.readouterr().err

    generator, _ = load_generator(run_dir)
    latent = read_latent(out / "photo.latent.npz")
    assert latent.weights_sha256 == result["weights_sha256"] == weights_sha256(generator)
    with torch.no_grad():
        expected = ((generator(torch.from_numpy(latent.z.copy())) + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()
    catinfer(["--onnx", str(run_dir), "--latent", one["latent"], "--out", str(tmp_path / "c.npy"), "--device", "cpu"])
    assert np.abs(np.load(tmp_path / "c.npy")[0] - expected).max() <= 1
    assert "warning" not in capsys.readouterr().err

    from trainer.data.images import decode, to_square

    with Image.open(one["projected"]) as pair:
        pixels = np.asarray(pair)
    np.testing.assert_array_equal(pixels[:, :SIZE], np.asarray(to_square(decode(photo.read_bytes()), SIZE, "center")))
    assert np.abs(pixels[:, SIZE:] - expected).max() <= 1
    with Image.open(one["film"]) as film:
        assert film.size == (2 * SIZE, SIZE)


def test_the_same_command_gives_the_same_bytes(run_dir: Path, photo: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        project(run_dir, photo, "--steps", 2, "--starts", 1, "--seed", 7, "--out", tmp_path / name)
    for name in ("photo.latent.npz", "photo.projected.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_search_writes_nothing(run_dir: Path, photo: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(self: object, step: int, loss: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command._Progress, "report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        project(run_dir, photo, "--out", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_every_photo_is_read_before_the_first_search(run_dir: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jpg: cannot be read"):
        project(run_dir, photo, tmp_path / "none.jpg", "--out", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"text", "not a picture"), (b"", "empty file"), ((4, 4), r"too small: 4x4.* needs 8"), ((40, 60), "no face")],
)
def test_photos_that_cannot_be_used(
    run_dir: Path, tmp_path: Path, content: bytes | tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.new("RGB", content, "white").save(path)
    with pytest.raises(UserError, match=rf"x\.png: {reason}"):
        project(run_dir, path, "--crop", "face" if reason == "no face" else "center", "--out", tmp_path)


def test_photos_of_the_same_name(run_dir: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 photos are named photo"):
        project(run_dir, photo, tmp_path / "photo.jpg")


def test_a_folder_is_not_a_photo(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give the images in it"):
        project(run_dir, tmp_path, "--out", tmp_path)


def test_weights_that_are_not_finite(run_dir: Path, photo: Path, tmp_path: Path) -> None:
    generator, info = load_generator(run_dir)
    spoilt = generator.state_dict()
    spoilt["layers.rgb16.bias"] = torch.full((3,), torch.nan)
    (tmp_path / "gen.safetensors").write_bytes(encode_generator(spoilt, info))
    with pytest.raises(UserError, match="weights are unusable"):
        project(tmp_path, photo, "--steps", 2, "--out", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_run_without_weights(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no generator"):
        project(tmp_path, photo)


@pytest.mark.parametrize("source", ["models:/catgan@champion", "runs:/" + "a" * 32, "a" * 32])
def test_generators_in_mlflow(photo: Path, source: str) -> None:
    with pytest.raises(UserError, match="give the folder of its run"):
        project(source, photo)


def test_a_folder_that_cannot_be_made(run_dir: Path, photo: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        project(run_dir, photo, "--out", photo)
