"""The sheets of real and generated images of a training. With classes, a row for each class."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catgan.dataset import Manifest
from infer.grid import grid
from trainer.config import Config
from trainer.data.stream import eval_batches, eval_images
from trainer.sample import generate
from trainer.step import GAN

_BATCH = 64
_SEARCHED = 32  # batches of reals in which images of all classes are searched


def by_class(config: Config) -> tuple[int, int]:
    """(rows, columns) of a sheet with a row for each class, the first ``track.grid`` of them."""
    rows = min(len(config.model.classes), config.track.grid)
    return rows, config.track.grid // rows


def fake_grid(gan: GAN) -> Image.Image:
    """Images of the EMA generator for the seeds from 0 on, the same each time, so that the sheets of a run show its
    progress. With classes, each row has the same seeds."""
    if not gan.config.model.classes:
        return _grid(generate(gan, range(gan.config.track.grid)))
    rows, columns = by_class(gan.config)
    seeds, labels = [*range(columns)] * rows, [label for label in range(rows) for _ in range(columns)]
    return _grid(generate(gan, seeds, labels=labels), columns)


def real_grid(manifest: Manifest, config: Config) -> Image.Image:
    """The first images of the train split, or of each class in it. Of a rare class some may be missing, and black."""
    if not config.model.classes:
        reals = torch.cat(list(itertools.islice(eval_images(manifest, "train", batch_size=_BATCH), 4)))
        return _grid(reals[: config.track.grid])
    rows, columns = by_class(config)
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    batches = eval_batches(manifest, "train", batch_size=_BATCH, labelled=True)
    for images, labels in itertools.islice(batches, _SEARCHED):
        for image, label in zip(images, labels.tolist(), strict=True):
            if label < rows and len(found[label]) < columns:
                found[label].append(image)
        if all(len(row) == columns for row in found):
            break
    black = torch.zeros(3, manifest.size, manifest.size, dtype=torch.uint8)
    return _grid(torch.stack([image for row in found for image in (row + [black] * columns)[:columns]]), columns)


def _grid(images: Tensor, columns: int | None = None) -> Image.Image:
    return grid(np.ascontiguousarray(images.cpu().permute(0, 2, 3, 1).numpy()), columns)
