"""Shapes, interfaces and initial statistics of the networks."""

from dataclasses import replace

import pytest
import torch

from trainer.config import ModelConfig
from trainer.models import build_discriminator, build_generator

TINY = ModelConfig(size=32, z_dim=8, g_width=16, d_width=16, max_width=32, blocks=1)


@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("arch", ["dcgan", "r3gan"])
def test_shapes(arch: str, size: int):
    config = replace(TINY, arch=arch, size=size)
    generator, discriminator = build_generator(config), build_discriminator(config)
    assert (generator.z_dim, generator.size) == (8, size)
    pictures = generator(torch.randn(3, 8))
    assert pictures.shape == (3, 3, size, size)
    real, fake = discriminator(torch.randn(2, 3, size, size), pictures)
    assert (real.shape, fake.shape) == ((2,), (3,))
    assert torch.isfinite(pictures).all()


@pytest.mark.parametrize(
    ("arch", "norm", "alike"), [("dcgan", "none", True), ("r3gan", "none", True), ("dcgan", "batch", True)]
)
def test_reals_and_fakes_together_are_judged_as_one_by_one(arch: str, norm: str, alike: bool):
    """One forward for both must not let fakes colour the judgement of reals, batch norm included."""
    torch.manual_seed(0)
    discriminator = build_discriminator(replace(TINY, arch=arch, d_norm=norm))
    reals, fakes = torch.randn(4, 3, 32, 32), 5 * torch.randn(4, 3, 32, 32)
    together, _ = discriminator(reals, fakes)
    (alone,) = discriminator(reals)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_r3gan_starts_as_identity_blocks_with_unit_scale():
    """The last convolution of each block starts at zero, so depth does not change the scale (Fix-up)."""
    torch.manual_seed(0)
    config = replace(TINY, arch="r3gan", g_width=64, max_width=64, blocks=2)
    z = torch.randn(256, 8)
    shallow, deep = (build_generator(replace(config, blocks=b)) for b in (1, 4))
    assert shallow(z).std().item() == pytest.approx(deep(z).std().item(), rel=0.5)
    assert 0.1 < deep(z).std().item() < 3


@pytest.mark.parametrize("arch", ["dcgan", "r3gan"])
def test_widths_double_per_halving_up_to_the_limit(arch: str):
    small, large = (build_generator(replace(TINY, arch=arch, max_width=w)) for w in (32, 64))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters())


def test_resampling_keeps_a_constant():
    """The low-pass filters sum to one in the interior: a flat picture stays flat."""
    from trainer.models.r3gan import _Downsample, _Upsample

    flat = torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(_Downsample(4, 4)(flat)[..., 1:, 1:], torch.ones(1, 4, 3, 3))
    torch.testing.assert_close(_Upsample(4, 4)(flat)[..., :-1, :-1], torch.ones(1, 4, 15, 15))
