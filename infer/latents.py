"""Latent vectors: which picture belongs to which seed, and the way between pictures.

The random numbers come from NumPy, outside the ONNX graph, and each picture has a generator of its own.
So picture *i* of ``--seed s`` is the picture of seed ``s + i``, whatever the number of pictures or the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def latents(seeds: Sequence[int], z_dim: int) -> np.ndarray:
    """Standard normal latents, float32 ``[len(seeds), z_dim]``: row ``i`` depends on ``seeds[i]`` (>= 0) alone."""
    z = np.empty((len(seeds), z_dim), np.float32)
    for row, seed in zip(z, seeds, strict=True):
        np.random.Generator(np.random.PCG64(seed)).standard_normal(out=row, dtype=np.float32)
    return z


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The point at ``t`` in [0, 1] on the great circle from ``a`` to ``b``, both float ``[z_dim]`` and not zero.

    A normal latent of many dimensions lies close to a sphere of radius sqrt(z_dim); the straight line between two
    leaves that sphere and gives washed-out pictures (White, "Sampling Generative Networks", 2016, section 2.1).
    Vectors on one line through the origin have no unique great circle: they are joined by the straight line.
    """
    cosine = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    if np.sin(angle) < 1e-4:
        return ((1 - t) * a + t * b).astype(a.dtype)
    return ((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)).astype(a.dtype)


def walk(keys: np.ndarray, steps: int) -> np.ndarray:
    """A closed walk through ``keys`` ``[n, z_dim]``, ``steps`` points from each to the next: ``[n * steps, z_dim]``.

    Point ``i * steps`` is key ``i``; the last stretch leads back to key 0, which is not repeated. The walk slows down
    towards each key and gathers speed after it (half a cosine), so that no turn is seen as a jerk.
    """
    ends = np.roll(keys, -1, axis=0)
    times = (1 - np.cos(np.pi * np.arange(steps) / steps)) / 2
    return np.stack([slerp(a, b, t) for a, b in zip(keys, ends, strict=True) for t in times])
