"""The nearest training images: the search against brute force, and what the report says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from catgan.command import UserError
from catgan.dataset import Manifest, Split
from tests.trainer.report.test_page import train
from trainer.cli import main
from trainer.data.build.shards import write_shards
from trainer.data.stream import eval_images
from trainer.report import neighbours
from trainer.report.neighbours import find_neighbours


class Pixels:
    """A metric network whose features are the pixels."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


class Given:
    """A generator of given images uint8 ``[n, 3, size, size]``, one after the other."""

    z_dim = 4

    def __init__(self, images: Tensor) -> None:
        self._left = images

    def __call__(self, z: Tensor) -> Tensor:
        images, self._left = self._left[: len(z)], self._left[len(z) :]
        return images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rng = np.random.default_rng(0)
    images = ((rng.integers(0, 256, (8, 8, 3), np.uint8), {"i": i}) for i in range(60))
    return write_shards(tmp_path_factory.mktemp("data") / "shards", images, size=8, val_fraction=0.25)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NUM_QUERIES", 10)
    monkeypatch.setattr(neighbours, "_BATCH", 5)
    monkeypatch.setattr(neighbours, "NUM_SHOWN", 4)


def test_the_search_equals_brute_force(manifest: Manifest) -> None:
    train_images = torch.cat(list(eval_images(manifest, "train", batch_size=7)))
    fakes = torch.randint(0, 256, (10, *train_images.shape[1:]), dtype=torch.uint8)
    fakes[6] = train_images[3]  # a copy
    found = find_neighbours(Given(fakes), manifest, Pixels())  # type: ignore[arg-type]
    expected = torch.cdist(fakes.flatten(1).double(), train_images.flatten(1).double())
    near, which = expected.sort(1)
    order = near[:, 0].argsort().tolist()[:4]
    assert found.seeds == order
    assert found.seeds[0] == 6
    assert found.distances[0][0] == 0
    for i, images, distances in zip(order, found.images, found.distances, strict=True):
        assert distances == pytest.approx(near[i, :3].tolist(), rel=1e-6)
        shown = [fakes[i], *train_images[which[i, :3]]]
        for image, pixels in zip(images, shown, strict=True):
            np.testing.assert_array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
    assert found.generated == pytest.approx(near[:, 0].median().item())


def test_held_out_images_are_measured_for_comparison(manifest: Manifest) -> None:
    train_images = torch.cat(list(eval_images(manifest, "train", batch_size=7)))
    held_out = torch.cat(list(eval_images(manifest, "val", batch_size=7)))[:10]
    found = find_neighbours(Given(train_images[:10]), manifest, Pixels())  # type: ignore[arg-type]
    distances = torch.cdist(held_out.flatten(1).double(), train_images.flatten(1).double()).amin(1)
    assert found.generated == 0
    assert found.num_held_out == len(held_out)
    assert found.held_out == pytest.approx(distances.median().item())
    without = replace(manifest, splits={**manifest.splits, "val": Split(())})
    assert find_neighbours(Given(train_images[:10]), without, Pixels()).held_out is None  # type: ignore[arg-type]


def test_what_is_missing_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    run = train(tmp_path / "a", kimg=4)
    with pytest.raises(UserError, match="has no best generator yet"):
        main(["report", str(run), "--neighbours", "-o", str(tmp_path / "a.html")])
    with pytest.raises(UserError, match="--neighbours is for one run"):
        main(["report", str(run), str(tmp_path / "b"), "--neighbours"])
    assert not (tmp_path / "a.html").exists()
    assert json.loads((run / "config.json").read_text())["data"]
