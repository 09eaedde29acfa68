"""A contact sheet of generated images beside their nearest neighbours in the training set, to see copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infer.grid import grid
from trainer.metrics.catfid.manifold import nearest

NUM_ROWS, NUM_NEAREST = 16, 5


def neighbour_sheet(fakes: Tensor, fake: Tensor, real: Tensor, batches: Iterable[Tensor]) -> Image.Image:
    """One row per generated image: the image, a white gap, then the real images nearest to it in feature space.

    Args:
        fakes: generated images uint8 ``[m, 3, H, W]``, m >= 1.
        fake: their features ``[m, d]``.
        real: features ``[n, d]`` of all real images.
        batches: the real images in the same order, uint8 ``[*, 3, H, W]``; read once.
    """
    _, which = nearest(fake, real, min(NUM_NEAREST, len(real)))
    wanted = {int(i) for i in which.flatten()}
    images = enumerate(itertools.chain.from_iterable(batches))
    found = {i: image for i, image in images if i in wanted}
    assert found.keys() == wanted, (len(found), len(wanted))
    gap = torch.full_like(fakes[0], 255)
    rows = [[image, gap, *(found[int(i)] for i in row)] for image, row in zip(fakes, which, strict=True)]
    tiles = torch.stack(list(itertools.chain.from_iterable(rows))).permute(0, 2, 3, 1)
    return grid(np.ascontiguousarray(tiles.numpy()), columns=len(rows[0]))
