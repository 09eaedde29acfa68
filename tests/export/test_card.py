from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.card import write_card
from export.generator import export_onnx, metadata
from infer.cli import main as catinfer
from infer.grid import grid
from infer.latents import latents
from infer.origin import inspect
from infer.session import Generator
from trainer.config import ModelConfig
from trainer.models import build_generator, num_parameters

METRIC = {
    "name": "fd2k_efflite0",
    "value": 143.256,
    "n_real": 14000,
    "n_fake": 2048,
    "extractor": "efflite0",
    "weights_sha256": "feed" * 16,
    "resize": "bilinear-128",
    "seed": 7,
    "seconds": 1.0,
}
INFO: dict[str, Any] = {
    "recipe": "dcgan-16",
    "kimg": 64.0,
    "metric": METRIC,
    "run_id": "0123abcd",
    "dataset_digest": "dada" * 16,
}
CONFIG = ModelConfig(size=16, z_dim=8, g_width=4)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "gen.onnx"
    export_onnx(build_generator(CONFIG), path, metadata(INFO))
    return path


def test_the_card_has_metric_protocol_and_origin(onnx_path: Path) -> None:
    card = write_card(onnx_path, INFO, 2.5e-7)
    assert card == onnx_path.with_name("card.md")
    text = card.read_text()
    for fact in ("`fd2k_efflite0`", "**143.26**", "2048", "14000", "bilinear-128", "feed" * 16, "dada" * 16):
        assert fact in text
    for fact in ("`dcgan-16`", "64 thousand images", "`0123abcd`", "2.5e-07", "16 x 16"):
        assert fact in text
    assert "catinfer --onnx gen.onnx --n 16 --seed 0" in text
    assert Generator(onnx_path, "cpu").metadata["weights_sha256"] in text
    assert sorted(p.name for p in onnx_path.parent.iterdir()) == ["card.md", "gen.onnx", "samples.png"]


def test_the_samples_are_the_images_of_catinfer(onnx_path: Path, tmp_path: Path) -> None:
    card = write_card(onnx_path, INFO, 0.0)
    assert "](samples.png)" in card.read_text()
    expected = grid(Generator(onnx_path, "cpu")(latents(range(16), CONFIG.z_dim)))
    path = onnx_path.with_name("samples.png")
    with Image.open(path) as samples:
        np.testing.assert_array_equal(np.asarray(samples), np.asarray(expected))
    record = inspect([str(path), str(onnx_path)])["files"][0]
    catinfer([*shlex.split(record["command"])[1:-1], str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()


def test_parameters_are_those_of_the_exported_graph(onnx_path: Path) -> None:
    """Batch norm is folded, so the file has slightly fewer than the module."""
    text = write_card(onnx_path, INFO, 0.0).read_text()
    count = float(text.split("| Parameters | ")[1].split(" million")[0]) * 1e6
    assert count == pytest.approx(num_parameters(build_generator(CONFIG)), abs=5e3)


@pytest.mark.parametrize(
    ("metric", "expected"), [(None, "Not evaluated."), ({"name": "fid50k", "value": 2.0}, "| `fid50k` | **2.00**")]
)
def test_a_card_without_evaluation_or_origin(onnx_path: Path, metric: dict[str, Any] | None, expected: str) -> None:
    text = write_card(onnx_path, {"recipe": "x", "kimg": 1.0, "metric": metric}, 0.0).read_text()
    assert expected in text
    assert "Training data | digest `unknown`" in text


def test_the_example_code_runs(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_card(onnx_path, INFO, 0.0).read_text()
    snippet = [line[4:] for line in text.splitlines() if line.startswith("    ") and "catinfer" not in line]
    assert snippet[0].startswith("import numpy")
    monkeypatch.chdir(onnx_path.parent)
    names: dict[str, Any] = {}
    exec("\n".join(snippet), names)
    assert names["image"].shape == (4, 3, 16, 16)
