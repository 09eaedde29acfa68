"""The search for the latent of an image: its loss, its prior, and that it finds what a generator made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models import build_generator
from trainer.models.common import Generator
from trainer.project import search as module
from trainer.project.search import Distance, Found, image, norm_prior, search

SIZE, Z_DIM = 16, 8


def network() -> Generator:
    """Random weights that make images of strong contrast."""
    torch.manual_seed(0)
    generator = build_generator(ModelConfig(size=SIZE, z_dim=Z_DIM, g_width=8))
    for parameter in generator.parameters():
        nn.init.normal_(parameter, 0.05, 0.3)
    generator.train()
    for _ in range(5):
        generator(torch.randn(64, Z_DIM))
    return generator.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 16)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return network()


@pytest.fixture(scope="module")
def truth() -> Tensor:
    z = torch.randn(1, Z_DIM, generator=torch.Generator().manual_seed(5))
    return z * (Z_DIM - 1) ** 0.5 / z.norm()  # of the most likely norm, so that the prior does not move it


def find(generator: Generator, truth: Tensor, steps: int = 50) -> Found:
    return search(generator, image(generator, truth), starts=2, steps=steps, seed=0)


def test_an_image_of_the_generator_is_found(generator: Generator, truth: Tensor) -> None:
    found = find(generator, truth)
    assert found.loss < 0.1 * found.seed_loss
    mistake = (image(generator, found.z) - image(generator, truth)).abs().mean()
    assert mistake < 0.1 * (image(generator, found.path[:1]) - image(generator, truth)).abs().mean()
    torch.testing.assert_close(Distance(image(generator, truth))(image(generator, found.z)).item(), found.loss)
    assert (found.path[-1] == found.z[0]).all()
    assert (found.z.shape, found.z.dtype, found.path.shape[1]) == ((1, Z_DIM), torch.float32, Z_DIM)


def test_the_same_arguments_give_the_same_latent(generator: Generator, truth: Tensor) -> None:
    a, b = (find(generator, truth, steps=3) for _ in range(2))
    assert (a.z == b.z).all()
    assert a.loss == b.loss


def test_no_step_makes_it_worse(generator: Generator, truth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RATE", 100.0)
    found = find(generator, truth, steps=3)
    assert found.loss <= found.seed_loss
    assert len(found.path) == 4


def test_the_path_of_a_long_search_is_thinned(generator: Generator, truth: Tensor, monkeypatch) -> None:
    monkeypatch.setattr(module, "FRAMES", 3)
    reported: list[int] = []
    found = search(generator, image(generator, truth), 1, 8, 0, lambda step, loss: reported.append(step))
    assert len(found.path) == 4  # after 0, 3, 6 and 8 steps
    assert reported == list(range(1, 9))


def test_the_seed_is_the_nearest_one(generator: Generator, truth: Tensor) -> None:
    from infer.latents import latents

    found = find(generator, truth, steps=1)
    target = image(generator, truth)
    losses = Distance(target)(image(generator, torch.from_numpy(latents(range(16), Z_DIM))))
    assert (found.seed, found.seed_loss) == (int(losses.argmin()), pytest.approx(float(losses.min()), rel=1e-5))


def test_the_distance_is_zero_for_the_target_and_has_gradients(generator: Generator, truth: Tensor) -> None:
    target = image(generator, truth)
    distance = Distance(target)
    assert distance(target).item() == pytest.approx(0, abs=1e-9)
    z = torch.randn(3, Z_DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    values = distance(image(generator, z))
    assert values.shape == (3,)
    assert (values > 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), z)
    assert (gradient.abs().sum(1) > 0).all()
    # Of each image it is its own, whatever the others are.
    (alone,) = torch.autograd.grad(distance(image(generator, z[:1])).sum(), z)
    torch.testing.assert_close(alone[0], gradient[0], rtol=1e-3, atol=1e-6)


def test_the_prior_is_that_of_the_norm_of_a_normal_latent() -> None:
    norms = torch.tensor([2.0, 5.0, 9.0, 9.95, 12.0], dtype=torch.float64)
    z = torch.zeros(5, 100, dtype=torch.float64)
    z[:, 0] = norms
    mode = 99**0.5
    expected = stats.chi.logpdf(mode, 100) - stats.chi.logpdf(norms.numpy(), 100)
    np.testing.assert_allclose(norm_prior(z).numpy(), expected, atol=1e-9)
    z[0, 0] = mode
    assert norm_prior(z)[0].item() == pytest.approx(0, abs=1e-12)


def test_the_prior_keeps_the_norm(generator: Generator, truth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of a latent that is far too large is found with a smaller one."""
    monkeypatch.setattr(module, "_PRIOR", 1.0)
    assert find(generator, 4 * truth, steps=20).z.norm() < 1.5 * truth.norm()
