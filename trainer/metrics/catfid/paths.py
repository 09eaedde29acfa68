"""Perceptual path length: how smoothly images change between two latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from infer.latents import slerp

EPSILON = 1e-4
_BATCH = 64
_EXTREMES = (1.0, 99.0)  # percentiles


def path_length(
    generate: Callable[[np.ndarray, int], Tensor],
    extract: Callable[[Tensor], Tensor],
    latents: Callable[[Sequence[int]], np.ndarray],
    num: int,
    seed: int,
    on_progress: Callable[[int], object] = lambda _: None,
) -> float:
    """Perceptual path length in Z (Karras et al., "A Style-Based Generator Architecture", 2019, eq. 2), full paths.

    The mean over ``num`` paths of ``|f(g(slerp(a, b, t))) - f(g(slerp(a, b, t + 1e-4)))|^2 / 1e-8``, with ``t`` uniform
    in [0, 1). In the paper ``f`` is LPIPS on VGG16 and face images are cropped; here ``f`` is any extractor, so values
    compare neither between extractors nor with the paper. As in its code, values below the 1st and above the 99th
    percentile are left out.

    Args:
        generate: latents float32 ``[n, z_dim]``, one on each path from the given number on, to images that are not
            rounded to 8 bits, because a step of 1e-4 changes most pixels by less than one of 256 levels.
        extract: the output of ``generate`` to features ``[n, d]``.
        latents: seeds to latents. Path ``i`` leads from ``seed + 2i`` to ``seed + 2i + 1``.
        seed: also the seed of the ``t``.
        on_progress: called with the number of paths of each batch.
    """
    assert num >= 1, num
    places = np.random.Generator(np.random.PCG64(seed)).random(num)
    lengths = []
    for first in range(0, num, _BATCH):
        t = places[first : first + _BATCH]
        start = seed + 2 * first
        ends = latents(range(start, start + 2 * len(t))).astype(np.float64)
        # slerp in float64: in float32 rounding errors would be a considerable part of a step of 1e-4.
        here, there = (
            np.stack([slerp(*row) for row in zip(ends[0::2], ends[1::2], place, strict=True)]).astype(np.float32)
            for place in (t, t + EPSILON)
        )
        # Both ends of a step are at the same place of equally large batches, so that they are computed identically.
        difference = extract(generate(here, first)).double() - extract(generate(there, first)).double()
        lengths.append(((difference**2).sum(1) / EPSILON**2).cpu())
        on_progress(len(t))
    values = torch.cat(lengths).numpy()
    low, high = np.percentile(values, _EXTREMES)
    return float(values[(values >= low) & (values <= high)].mean())
