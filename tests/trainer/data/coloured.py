"""A small data set whose classes can be seen: the class of an image is the channel that is bright, and the number of
the image is the value of the channel after that."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catgan.dataset import Manifest
from trainer.data.build.shards import write_shards

SIZE, NUM = 16, 60
COLOURS = ("blue", "green", "red")  # sorted, as the names of classes are
_CHANNEL = {"red": 0, "green": 1, "blue": 2}


def write_coloured(folder: Path, *, labelled: bool = True, val_fraction: float = 0.2) -> Manifest:
    """48 images for training and 12 for validation; every second one is red, and two thirds of the others are green."""

    def images() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for i in range(NUM):
            colour = "red" if i % 2 else "green" if i % 3 else "blue"
            image = np.zeros((SIZE, SIZE, 3), np.uint8)
            image[..., _CHANNEL[colour]] = 255
            image[..., (_CHANNEL[colour] + 1) % 3] = i
            yield image, {"colour": colour}

    label = "colour" if labelled else None
    return write_shards(folder, images(), size=SIZE, val_fraction=val_fraction, label=label)


def seen(images: Tensor) -> Tensor:
    """The labels of images ``[n, 3, h, w]`` by their colours."""
    brightest = images.float().mean((2, 3)).argmax(1)
    return torch.tensor([2, 1, 0])[brightest]  # of red, green, blue
