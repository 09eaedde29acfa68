"""Directions in the latent space along which a generator's first features vary most (GANSpace, Härkönen et al. 2020).

Directions are always of z, also where a mapping network makes w of it, and are found as for BigGAN there: principal
components of the features of many latents, then for each component the latent direction by linear regression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from infer import session
from infer.directions import ENTRY, encode
from infer.grid import grid
from infer.latents import latents
from trainer.models import Generator

COUNT = 8
_LATENTS = 2048
_CHUNK = 256  # latents whose features are computed at a time
_OVERSAMPLING, _ITERATIONS = 8, 4  # of the randomised SVD (Halko et al. 2011)
_NEGLIGIBLE = 1e-4  # standard deviation of a component, relative to the first one's
SEEDS = 4
AMOUNTS = (-2, -1, 0, 1, 2)


def metadata(generator: Generator) -> dict[str, str]:
    """The entry of an ONNX file's metadata with the directions of ``generator``, see ``infer.directions``."""
    vectors = find_directions(generator)
    return {ENTRY: encode(vectors)} if len(vectors) else {}


@torch.no_grad()
def find_directions(generator: Generator) -> np.ndarray:
    """At most ``COUNT`` unit vectors, float32 ``[k, z_dim]``, those of the largest components first.

    Vector ``k`` is column ``k`` of the paper's U, which minimises the squared error of U x as an estimate of z, where x
    are the coordinates of the features of z in their principal components; normalised. Vectors of different components
    are almost orthogonal, not exactly. Its largest entry is positive, since the sign of a principal component is
    arbitrary. Deterministic.

    Args:
        generator: in evaluation mode, on the CPU.

    Returns:
        No vectors for a network whose features are constant or not finite.
    """
    num_classes = len(getattr(generator, "classes", ()))
    z = _uncorrelated_latents(max(_LATENTS, 4 * generator.z_dim, 8 * num_classes), generator.z_dim)
    if num_classes:
        features = _within_classes(generator, z, num_classes)
    else:
        features = torch.cat([generator.features(part).flatten(1) for part in z.split(_CHUNK)])
        features -= features.mean(0)
    if not features.isfinite().all():
        return np.empty((0, generator.z_dim), np.float32)
    count = min(COUNT, generator.z_dim, features.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rank = min(count + _OVERSAMPLING, *features.shape)
        coordinates, deviations, _ = torch.svd_lowrank(features, rank, _ITERATIONS)
    # The coordinates of a component, divided by its standard deviation: they are uncorrelated, so each has a
    # regression of its own.
    varies = deviations[:count] > _NEGLIGIBLE * deviations[0]
    vectors = (coordinates[:, :count].T @ z)[varies]
    vectors /= vectors.norm(dim=1, keepdim=True)
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return (vectors * vectors.gather(1, largest).sign()).numpy()


def _within_classes(generator: Generator, z: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Features of ``z`` with all classes in turn, less the mean of the features of their class."""
    labels = torch.arange(len(z)) % num_classes
    conditions: list[dict[str, Any]] = [{"label": label} for label in labels.split(_CHUNK)]
    parts = zip(z.split(_CHUNK), conditions, strict=True)
    features = torch.cat([generator.features(part, **condition).flatten(1) for part, condition in parts])
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return features - (sums / labels.bincount(minlength=num_classes).clamp(min=1)[:, None])[labels]


def sheet(generator: session.Generator, directions: np.ndarray) -> Image.Image:
    """A row for each of ``directions`` ``[k, z_dim]``, k >= 1: the first ``SEEDS`` seeds, each moved by ``AMOUNTS``."""
    z = latents(range(SEEDS), generator.z_dim)
    moves = np.multiply.outer(directions, np.array(AMOUNTS, np.float32))  # [k, z_dim, amounts]
    points = z[None, :, None] + moves.transpose(0, 2, 1)[:, None]
    labels = [
        f"{k}: {amount:+d}" if amount else f"{k}: 0"
        for k in range(1, len(directions) + 1)
        for _ in z
        for amount in AMOUNTS
    ]
    return grid(generator(points.reshape(-1, generator.z_dim)), SEEDS * len(AMOUNTS), labels)


def _uncorrelated_latents(n: int, z_dim: int) -> torch.Tensor:
    """Latents ``[n, z_dim]`` of N(0, I) whose own mean is 0 and whose own covariance is exactly I: the regression then
    needs fewer of them, since no correlation is by chance."""
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((n, z_dim), dtype=np.float32))
    orthonormal, _ = torch.linalg.qr(z - z.mean(0))
    return orthonormal * n**0.5
