"""Perceptual path length for linear generators and extractors, whose value is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from infer.latents import latents
from infer.session import Generator
from trainer.metrics.catfid.evaluation import perceptual_path_length
from trainer.metrics.catfid.paths import path_length


def as_images(z: np.ndarray, first: int) -> torch.Tensor:
    return torch.from_numpy(z)


def orthogonal_ends(seeds: Sequence[int]) -> np.ndarray:
    """Alternating unit vectors of two axes: every path is a quarter of a circle."""
    z = np.zeros((len(seeds), 8), np.float32)
    z[range(len(seeds)), [seed % 2 for seed in seeds]] = 1.0
    return z


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_a_quarter_circle_has_constant_speed(gain: float):
    length = path_length(as_images, lambda images: gain * images.double(), orthogonal_ends, num=150, seed=4)
    assert length == pytest.approx((gain * np.pi / 2) ** 2, rel=2e-3)


def test_extreme_paths_are_left_out():
    def ends(seeds: Sequence[int]) -> np.ndarray:
        z = orthogonal_ends(seeds)
        z[[i for i, seed in enumerate(seeds) if seed < 2]] *= 1e3  # the first path only
        return z

    length = path_length(as_images, lambda images: images.double(), ends, num=150, seed=0)
    assert length == pytest.approx((np.pi / 2) ** 2, rel=2e-3)


def test_paths_use_their_own_seeds_in_batches():
    used: list[int] = []

    def ends(seeds: Sequence[int]) -> np.ndarray:
        used.extend(seeds)
        return latents(seeds, 8)

    progress: list[int] = []
    numbers: list[int] = []

    def numbered(z: np.ndarray, first: int) -> torch.Tensor:
        numbers.append(first)
        return torch.from_numpy(z)

    first = path_length(numbered, lambda x: x, ends, num=70, seed=10, on_progress=progress.append)
    assert numbers == [0, 0, 64, 64]
    assert used == list(range(10, 150))
    assert sum(progress) == 70
    assert first == path_length(as_images, lambda x: x, lambda seeds: latents(seeds, 8), num=70, seed=10)
    assert first != path_length(as_images, lambda x: x, lambda seeds: latents(seeds, 8), num=70, seed=11)


def test_images_are_not_rounded_for_path_length(generator_file: Path):
    """With rounding nearly all steps would be 0 and a few huge; without, the length is that of the derivative."""

    class Pixels:
        name, dim, weights_sha256, resize, device = "pixels", 768, "0" * 64, "none", torch.device("cpu")

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.float32
            assert 0 <= images.min() < 20 < 200 < images.max() <= 255
            return images.flatten(1)

        def logits(self, features: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    generator = Generator(generator_file, "cpu")
    length = perceptual_path_length(generator, Pixels(), 40, 0)
    z = latents(range(80), 8).astype(np.float64)
    import onnx
    from onnx import numpy_helper

    matrix = numpy_helper.to_array(onnx.load(generator_file).graph.initializer[0]).astype(np.float64)
    t = np.random.Generator(np.random.PCG64(0)).random(40)
    a, b = z[0::2], z[1::2]
    angle = np.arccos((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    at = (np.sin((1 - t) * angle)[:, None] * a + np.sin(t * angle)[:, None] * b) / np.sin(angle)[:, None]
    speed = angle[:, None] * (np.cos(t * angle)[:, None] * b - np.cos((1 - t) * angle)[:, None] * a)
    speed /= np.sin(angle)[:, None]
    lengths = ((127.5 * (1 - np.tanh(at @ matrix) ** 2) * (speed @ matrix)) ** 2).sum(1)
    low, high = np.percentile(lengths, [1, 99])
    assert length == pytest.approx(lengths[(lengths >= low) & (lengths <= high)].mean(), rel=0.01)
