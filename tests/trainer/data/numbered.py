"""A small data set whose images can be told apart: the number of an image is the red value of its first pixel."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from catgan.dataset import Manifest
from trainer.config import LoaderConfig
from trainer.data.build.shards import write_shards
from trainer.data.stream import StreamPosition, TrainStream

SIZE, NUM = 16, 53


def write_numbered(folder: Path) -> Manifest:
    """42 images for training and 11 for validation, in 16 shards and one."""
    images = np.full((NUM, SIZE, SIZE, 3), 128, np.uint8)
    images[:, 0, 0] = [(i, 0, 0) for i in range(NUM)]
    return write_shards(folder, ((image, {"i": i}) for i, image in enumerate(images)), size=SIZE, val_fraction=0.2)


def numbers(batches: Iterable[Tensor]) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0, 0, 0]]


def stream(
    manifest: Manifest,
    *,
    rank: int = 0,
    nimg: int = 0,
    seed: int = 0,
    readers: int = 0,
    batch: int = 4,
    per_segment: int = 6,
    memory_mib: int = 0,
) -> TrainStream:
    """The train stream of one rank in a training with one rank."""
    position = StreamPosition(
        seed=seed,
        rank=rank,
        nimg=nimg,
        batch=batch,
        batches_per_segment=per_segment,
        images_per_segment=batch * per_segment,
    )
    return TrainStream(manifest, position, LoaderConfig(workers=readers, shuffle_buffer=20, memory_mib=memory_mib))


def take(batches: Iterable[Tensor], count: int) -> list[int]:
    """The numbers of the images in the next ``count`` batches."""
    return numbers(islice(batches, count))
