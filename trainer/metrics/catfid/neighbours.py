"""A sheet of generated pictures beside those of the training set that are nearest: did the generator copy?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infer.grid import grid
from trainer.metrics.catfid.manifold import nearest

SHOWN, NEAREST = 16, 5


def neighbour_sheet(fakes: Tensor, fake: Tensor, real: Tensor, batches: Iterable[Tensor]) -> Image.Image:
    """One row a fake: the fake, a white gap, then the reals nearest to it in feature space, the nearest first.

    Args:
        fakes: pictures uint8 ``[m, 3, H, W]``, m >= 1.
        fake: their features ``[m, d]``.
        real: features ``[n, d]`` of all reals.
        batches: the reals in the same order, uint8 ``[*, 3, H, W]``; read once.
    """
    _, which = nearest(fake, real, min(NEAREST, len(real)))
    wanted = {int(i) for i in which.flatten()}
    pictures = enumerate(itertools.chain.from_iterable(batches))
    found = {i: picture for i, picture in pictures if i in wanted}
    assert found.keys() == wanted, (len(found), len(wanted))
    gap = torch.full_like(fakes[0], 255)
    rows = [[picture, gap, *(found[int(i)] for i in row)] for picture, row in zip(fakes, which, strict=True)]
    tiles = torch.stack(list(itertools.chain.from_iterable(rows))).permute(0, 2, 3, 1)
    return grid(np.ascontiguousarray(tiles.numpy()), columns=len(rows[0]))
