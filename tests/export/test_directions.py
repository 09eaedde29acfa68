"""Directions of generators: what they are, that they are stored, and that moving along them does what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export import directions
from export.card import write_card
from export.directions import AMOUNTS, COUNT, SEEDS, find_directions
from export.generator import export_onnx
from infer.directions import read_directions
from infer.latents import latents
from infer.session import Generator
from trainer.config import ModelConfig
from trainer.models import ARCHITECTURES, AtLevel, build_generator
from trainer.models.common import Generator as Network

Z_DIM = 24
INFO = {"recipe": "x", "kimg": 1.0, "metric": None}


def network(arch: str) -> Network:
    """With random weights whose features differ in their variances, as those of trained ones do."""
    torch.manual_seed(0)
    config = ModelConfig(arch=arch, size=16, z_dim=Z_DIM, g_width=8, max_width=32, blocks=1, group_width=8)  # type: ignore[arg-type]
    generator = build_generator(config)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if arch == "r3gan" and parameter.abs().max() == 0:
                nn.init.normal_(parameter, 0, 0.1)  # the last layers of its blocks
            if name in ("linear.weight", "first.weight", "layers.to4.weight", "layers.to4.0.weight", "to4.weight"):
                # A gated unit passes less of a component on, so components have to differ more.
                scale = (0.75 if arch == "fastgan" else 0.9) ** torch.arange(Z_DIM)
                parameter.mul_(scale.reshape(*(-1 if n == Z_DIM else 1 for n in parameter.shape)))
    generator.train()
    for _ in range(3):
        generator(torch.randn(64, Z_DIM))
    return generator.eval().requires_grad_(False)


class Linear(Network):
    """Features that are a linear map of the latent with known singular values and vectors."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.z_dim, self.size = Z_DIM, 8
        random = torch.Generator().manual_seed(0)
        self.left = torch.linalg.qr(torch.randn(160, Z_DIM, generator=random))[0]
        self.right = torch.linalg.qr(torch.randn(Z_DIM, Z_DIM, generator=random))[0].T  # a row each
        self.values = 10 * 0.8 ** torch.arange(Z_DIM)

    def features(self, z: Tensor) -> Tensor:
        return ((z @ self.right.T * self.values) @ self.left.T + 3).reshape(-1, 10, 4, 4)


def test_of_a_linear_map_they_are_its_singular_vectors() -> None:
    found = find_directions(Linear())
    expected = Linear().right[:COUNT].numpy()
    signs = np.sign(np.take_along_axis(expected, np.abs(expected).argmax(1)[:, None], axis=1))
    np.testing.assert_allclose(found, expected * signs, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_they_are_the_regression_of_the_paper(arch: str) -> None:
    """U minimises sum |U x - z|^2 for the coordinates x of the exact principal components."""
    generator, found = network(arch), find_directions(network(arch))
    z = directions._uncorrelated_latents(2048, Z_DIM)
    features = generator.features(z).flatten(1).double()
    centred = features - features.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    x = centred @ components[:COUNT].T
    solution = torch.linalg.lstsq(x, z.double()).solution
    expected = (solution / solution.norm(dim=1, keepdim=True)).numpy()
    assert found.shape == (COUNT, Z_DIM)
    agreement = np.abs((found * expected).sum(1))
    assert (agreement[:3] > 0.999).all(), agreement
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (np.take_along_axis(found, np.abs(found).argmax(1)[:, None], axis=1) > 0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_principal_coordinate_follows_the_multiple(arch: str) -> None:
    """On latents that were not used to find the directions."""
    generator, found = network(arch), find_directions(network(arch))
    z = torch.from_numpy(latents(range(500), Z_DIM))

    def features(latent: Tensor) -> Tensor:
        return generator.features(latent).flatten(1)

    _, _, components = torch.linalg.svd(features(z) - features(z).mean(0), full_matrices=False)
    for direction in found[:3]:
        moved = [features(z + amount * torch.from_numpy(direction)).mean(0) for amount in AMOUNTS]
        at_zero = moved[AMOUNTS.index(0)]
        shifts = torch.stack([(m - at_zero) @ components[:COUNT].T for m in moved])  # [amounts, COUNT]
        own = int(shifts[-1].abs().argmax())
        steps = shifts[:, own].diff()
        assert (steps > 0).all() or (steps < 0).all()
        others = [k for k in range(COUNT) if k != own]
        assert shifts[-1, own].abs() > 2 * shifts[-1, others].abs().max(), "the other components hardly move"


def test_they_do_not_depend_on_chance_and_leave_it_alone() -> None:
    generator = network("dcgan")
    torch.manual_seed(1)
    first = find_directions(generator)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    torch.manual_seed(2)
    np.testing.assert_array_equal(find_directions(generator), first)


def test_a_progressive_network_below_full_resolution() -> None:
    generator = network("progan")
    np.testing.assert_array_equal(find_directions(AtLevel(generator, 3.5)), find_directions(generator))


@pytest.mark.parametrize("spoil", [lambda p: p.zero_(), lambda p: p.fill_(torch.nan)])
def test_networks_without_directions(spoil: Callable[[Tensor], Tensor]) -> None:
    generator = network("dcgan")
    for parameter in generator.parameters():
        spoil(parameter)
    assert directions.metadata(generator) == {}


def test_fewer_latent_dimensions_than_directions() -> None:
    generator = build_generator(ModelConfig(size=8, z_dim=4, g_width=4)).eval()
    assert find_directions(generator).shape == (4, 4)


def test_the_file_has_them_and_the_card_shows_them(tmp_path: Path) -> None:
    generator, path = network("dcgan"), tmp_path / "gen.onnx"
    export_onnx(generator, path, directions.metadata(generator))
    file = Generator(path, "cpu")
    read = read_directions(file.metadata, Z_DIM, path)
    np.testing.assert_allclose(read, find_directions(generator), atol=5e-4)
    text = write_card(path, INFO, 0.0).read_text()
    assert "](directions.png)" in text
    with Image.open(tmp_path / "directions.png") as sheet:
        pixels = np.asarray(sheet)
    width, height = pixels.shape[1] // (SEEDS * len(AMOUNTS)), pixels.shape[0] // COUNT
    row, seed, step = 2, 1, 3
    left = (seed * len(AMOUNTS) + step) * width + (width - 16) // 2
    shown = pixels[row * height : row * height + 16, left : left + 16]
    z = latents([seed], Z_DIM) + np.float32(AMOUNTS[step]) * read[row]
    np.testing.assert_array_equal(shown, file(z)[0])


def test_a_card_of_a_file_without_them(tmp_path: Path) -> None:
    export_onnx(network("dcgan"), tmp_path / "gen.onnx", {})
    assert "Directions" not in write_card(tmp_path / "gen.onnx", INFO, 0.0).read_text()
    assert not (tmp_path / "directions.png").exists()
