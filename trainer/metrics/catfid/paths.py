"""How smoothly pictures change on the way between two latents."""

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
    generate: Callable[[np.ndarray], Tensor],
    extract: Callable[[Tensor], Tensor],
    latents: Callable[[Sequence[int]], np.ndarray],
    num: int,
    seed: int,
    seen: Callable[[int], object] = lambda _: None,
) -> float:
    """Perceptual path length in Z (Karras et al., "A Style-Based Generator Architecture", 2019, eq. 2), full paths.

    The mean over ``num`` paths of ``|f(g(slerp(a, b, t))) - f(g(slerp(a, b, t + 1e-4)))|^2 / 1e-8``, with ``t`` uniform
    in [0, 1). The paper's ``f`` is LPIPS on VGG16 and its pictures of faces are cropped; this ``f`` is any extractor's
    pooled features, so values of different extractors, or of the paper, cannot be compared. As its authors do, values
    below the 1st and above the 99th percentile are left out.

    Args:
        generate: latents float32 ``[n, z_dim]`` to pictures that are not rounded to 8 bits: a step of 1e-4 changes most
            pixels by less than one of 256 levels.
        extract: what ``generate`` makes to features ``[n, d]``.
        latents: of seeds. Path ``i`` leads from that of ``seed + 2i`` to that of ``seed + 2i + 1``.
        seed: also of the ``t``.
        seen: is told the number of paths of each batch.
    """
    assert num >= 1, num
    places = np.random.Generator(np.random.PCG64(seed)).random(num)
    lengths = []
    for first in range(0, num, _BATCH):
        t = places[first : first + _BATCH]
        start = seed + 2 * first
        ends = latents(range(start, start + 2 * len(t))).astype(np.float64)
        # In float32 rounding would be a part of a step of 1e-4.
        here, there = (
            np.stack([slerp(*row) for row in zip(ends[0::2], ends[1::2], place, strict=True)]).astype(np.float32)
            for place in (t, t + EPSILON)
        )
        # Neighbours pass through the networks in one batch each, so that both are computed alike.
        difference = extract(generate(here)).double() - extract(generate(there)).double()
        lengths.append(((difference**2).sum(1) / EPSILON**2).cpu())
        seen(len(t))
    values = torch.cat(lengths).numpy()
    low, high = np.percentile(values, _EXTREMES)
    return float(values[(values >= low) & (values <= high)].mean())
