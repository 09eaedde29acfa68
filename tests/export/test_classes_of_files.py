"""What is made with the exported file of a conditional generator: card, comparison of precisions, evaluation."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.card import write_card
from export.evaluate import evaluate_file
from export.generator import export_onnx, metadata
from export.variants import make_variants
from infer.session import Generator
from tests.export.test_classes import SIZE, network
from trainer.metrics import classes
from trainer.metrics.catfid.sides import open_side

INFO: dict[str, Any] = {
    "recipe": "dcgan-8",
    "kimg": 1.0,
    "metric": {"name": "fd2k_efflite0", "value": 1.0, "class_counts": [50, 0, 150]},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("best") / "gen.onnx"
    export_onnx(network("dcgan"), path, metadata(INFO))
    return path


def test_the_card_names_the_classes_and_shows_each_in_a_row(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(exported, tmp_path))
    text = write_card(path, INFO, 0.0).read_text()
    assert "| Classes | 0 tabby, 1 tuxedo, long hair, 2 ähnlich |" in text
    assert "--class tabby" in text
    assert '"label": numpy.arange(4) % 3' in text
    assert "no conditions" not in text
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    generator = Generator(path, "cpu")
    z = np.random.Generator(np.random.PCG64(2)).standard_normal((1, generator.z_dim), dtype=np.float32)
    for label in range(3):
        (image,) = generator(z, label=label)
        np.testing.assert_array_equal(sheet[label * SIZE : (label + 1) * SIZE, 2 * SIZE : 3 * SIZE], image)


def test_files_are_evaluated_with_the_frequencies_of_the_reals(exported: Path) -> None:
    """Also by catfid, which knows them from the metadata."""
    generator = Generator(exported, "cpu")
    found = Counter(classes.as_trained(generator, range(400)).tolist())
    assert set(found) == {0, 2}
    assert abs(found[0] - 100) < 3
    assert Counter(classes.in_turn(generator, 9).tolist()) == {0: 3, 1: 3, 2: 3}
    assert classes.in_turn(generator, 4, first=64).tolist() == [1, 2, 0, 1]
    side: Any = open_side(str(exported), split=None, num=8, seed=0)
    images = torch.cat(list(side.batches()))
    z = np.concatenate(
        [np.random.Generator(np.random.PCG64(s)).standard_normal((1, 8), dtype=np.float32) for s in range(8)]
    )
    expected = generator(z, label=classes.as_trained(generator, range(8)))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_evaluate_file_takes_the_split_of_the_evaluator(exported: Path, tmp_path: Path) -> None:
    from catgan.dataset import Split

    path = Path(shutil.copy(exported, tmp_path))
    generator, seen = Generator(path, "cpu"), []

    class Stub:
        name, split = "fd40_efflite0", "train"
        manifest = type("M", (), {"splits": {"train": Split((), (0, 40, 0))}})

        def prepare(self) -> None:
            pass

        def __call__(self, generate: Any) -> dict[str, Any]:
            seen.append(generate(range(4)))
            return {"name": self.name, "value": 1.0, "n_fake": 40}

    evaluate_file(path, Stub())  # type: ignore[arg-type]
    z = np.concatenate(
        [np.random.Generator(np.random.PCG64(s)).standard_normal((1, 8), dtype=np.float32) for s in range(4)]
    )
    expected = generator(z, label=1)
    np.testing.assert_array_equal(seen[0].permute(0, 2, 3, 1).numpy(), expected)


def test_precisions_are_compared_over_all_classes(tmp_path: Path) -> None:
    paths = {p: tmp_path / f"{p}.onnx" for p in ("fp32", "fp16")}
    _, half = make_variants(network("dcgan"), INFO, paths)
    assert half.psnr is not None
    assert half.psnr > 50
