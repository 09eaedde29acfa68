"""Latent vectors of seeds, and paths between them.

The random numbers come from NumPy, outside the ONNX graph, with a random generator per image. So image *i* of
``--seed s`` is image 0 of ``--seed s + i``, for any number of images and any batch size.
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

    The norm of a normal latent of many dimensions is close to sqrt(z_dim); on the straight line between two latents it
    is smaller, which gives washed-out images (White, "Sampling Generative Networks", 2016, section 2.1). Parallel and
    opposite vectors, which have no unique great circle, are joined by the straight line.
    """
    cosine = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    if np.sin(angle) < 1e-4:
        return ((1 - t) * a + t * b).astype(a.dtype)
    return ((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)).astype(a.dtype)


def walk(keys: np.ndarray, steps: int) -> np.ndarray:
    """A closed walk through ``keys`` ``[n, z_dim]``, ``steps`` points from each to the next: ``[n * steps, z_dim]``.

    Point ``i * steps`` is key ``i``; the last section returns to key 0, which is not repeated. The speed falls to zero
    at each key (half a cosine), so that the changes of direction are not visible as jerks.
    """
    ends = np.roll(keys, -1, axis=0)
    times = (1 - np.cos(np.pi * np.arange(steps) / steps)) / 2
    return np.stack([slerp(a, b, t) for a, b in zip(keys, ends, strict=True) for t in times])
