"""Shapes, interfaces and initial statistics of the networks."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import GrowConfig, ModelConfig
from trainer.models import ARCHITECTURES, AtLevel, build_discriminator, build_generator, resize_to_level
from trainer.models.batchnorm import BatchNorm, _NormaliseOverRanks, separate_statistics
from trainer.models.progan import EqualConv, minibatch_stddev, pixel_norm

TINY = ModelConfig(size=32, z_dim=8, g_width=16, d_width=16, max_width=32, blocks=1)


@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("arch", ARCHITECTURES)
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
    ("arch", "norm"), [("dcgan", "none"), ("r3gan", "none"), ("dcgan", "batch"), ("progan", "none")]
)
def test_reals_and_fakes_together_are_judged_as_one_by_one(arch: str, norm: str):
    """One forward for both must not let fakes colour the judgement of reals, batch statistics included."""
    torch.manual_seed(0)
    discriminator = build_discriminator(replace(TINY, arch=arch, d_norm=norm))
    reals, fakes = torch.randn(4, 3, 32, 32), 5 * torch.randn(4, 3, 32, 32)
    together, _ = discriminator(reals, fakes)
    (alone,) = discriminator(reals)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_batch_norm_sees_batches_in_one_pass_as_it_sees_them_in_turn():
    """The same values, gradients and running statistics."""
    torch.manual_seed(0)
    one_pass, in_turn = BatchNorm(3), BatchNorm(3)
    batches = [torch.randn(4, 3, 5, 5), 2 + 3 * torch.randn(2, 3, 5, 5)]
    wanted = torch.randn(6, 3, 5, 5)
    found = []
    with separate_statistics(nn.Sequential(one_pass), [4, 2]):
        x = torch.cat(batches).requires_grad_()
        found.append((one_pass(x), x))
    x = torch.cat(batches).requires_grad_()
    found.append((torch.cat([in_turn(x[:4]), in_turn(x[4:])]), x))
    for y, _ in found:
        (y * wanted).sum().backward()
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][1].grad, found[1][1].grad)
    torch.testing.assert_close(one_pass.state_dict(), in_turn.state_dict())
    assert one_pass.sizes is None
    torch.testing.assert_close(one_pass(batches[1]), in_turn(batches[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_over_ranks_has_the_arithmetic_of_pytorchs(layout: torch.memory_format, dtype: torch.dtype):
    """On one rank, whose sums are those of all."""
    torch.manual_seed(0)
    sizes, eps = [4, 2], 1e-5
    values = (3 + 2 * torch.randn(6, 8, 5, 5)).to(dtype).contiguous(memory_format=layout)
    wanted = torch.randn(6, 8, 5, 5).to(dtype)
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)

    def found(normalise: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (values, weight, bias)]
        y = normalise(*inputs)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        return [y, *torch.autograd.grad((y * wanted).sum(), inputs)]

    with mock.patch("trainer.models.batchnorm.sum_over_ranks", torch.clone):
        ours = found(lambda x, w, b: _NormaliseOverRanks.apply(x, sizes, w, b, eps)[0])
    theirs = found(
        lambda x, w, b: torch.cat(
            [F.batch_norm(part, None, None, w, b, training=True, eps=eps) for part in x.split(sizes)]
        )
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_r3gan_starts_as_identity_blocks_with_unit_scale():
    """The last convolution of each block starts at zero, so depth does not change the scale (Fix-up)."""
    torch.manual_seed(0)
    config = replace(TINY, arch="r3gan", g_width=64, max_width=64, blocks=2)
    z = torch.randn(32, 8)
    with torch.no_grad():
        shallow, deep = (build_generator(replace(config, blocks=b))(z).std().item() for b in (1, 4))
    assert shallow == pytest.approx(deep, rel=0.5)
    assert 0.1 < deep < 3


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


@pytest.mark.parametrize("head", ["conv", "dense"])
def test_heads_make_the_same_maps(head: str):
    generator = build_generator(replace(TINY, g_head=head))
    assert generator.layers.to4(torch.randn(3, 8, 1, 1)).shape == (3, 32, 4, 4)


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    discriminator = build_discriminator(replace(TINY, d_norm="none", d_dropout=0.5))
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(discriminator.logits(images), discriminator.logits(images))
    discriminator.eval()
    assert torch.equal(discriminator.logits(images), discriminator.logits(images))


PROGAN = replace(TINY, arch="progan")


def test_a_fade_goes_from_the_old_resolution_enlarged_to_the_new_one():
    torch.manual_seed(0)
    generator = build_generator(PROGAN)
    z = torch.randn(2, 8)
    old, new = generator(z, level=3.0), generator(z, level=4.0)
    assert (old.shape[-1], new.shape[-1]) == (8, 16)
    enlarged = old.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(generator(z, level=3.25), 0.75 * enlarged + 0.25 * new)
    torch.testing.assert_close(generator(z, level=5.0), generator(z))


def test_a_growing_discriminator_starts_a_fade_with_its_old_judgement():
    torch.manual_seed(0)
    discriminator = build_discriminator(PROGAN)
    small = torch.randn(4, 3, 8, 8)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        discriminator.logits(large, level=3 + 1e-6), discriminator.logits(small, level=3.0), rtol=1e-3, atol=1e-4
    )


def test_reals_fade_like_fakes():
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(resize_to_level(images, 5.0), images)
    torch.testing.assert_close(resize_to_level(images, 3.0), F.avg_pool2d(images, 4))
    coarse = F.avg_pool2d(images, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(resize_to_level(images, 3.5), 0.5 * coarse + 0.5 * F.avg_pool2d(images, 2))


def test_an_unfinished_generator_draws_at_full_size():
    generator = build_generator(PROGAN)
    z = torch.randn(2, 8)
    pictures = AtLevel(generator, 3.0)(z)
    torch.testing.assert_close(F.avg_pool2d(pictures, 4), generator(z, level=3.0))


def test_the_minibatch_standard_deviation_sees_collapse():
    same = torch.randn(1, 4, 4, 4).expand(6, 4, 4, 4)
    assert minibatch_stddev(same, over_ranks=False).item() == pytest.approx(0.0, abs=1e-3)
    spread = torch.tensor([-2.0, 2.0]).view(2, 1, 1, 1).expand(2, 4, 4, 4)
    assert minibatch_stddev(spread, over_ranks=False).item() == pytest.approx(2.0)


def test_equalised_layers_keep_the_scale_whatever_their_width():
    torch.manual_seed(0)
    for width in (16, 256):
        conv = EqualConv(width, 64, 3, 1)
        assert conv.weight.std().item() == pytest.approx(1.0, rel=0.1)
        assert conv(torch.randn(8, width, 8, 8))[..., 1:-1, 1:-1].std().item() == pytest.approx(2**0.5, rel=0.1)


def test_pixels_are_normalised_over_features():
    torch.testing.assert_close(pixel_norm(3 * torch.randn(2, 5, 4, 4)).square().mean(1), torch.ones(2, 4, 4))


def test_growth_holds_then_fades():
    grow = GrowConfig(start=4, hold_kimg=10, fade_kimg=20)
    levels = [grow.level(n, 16) for n in (0, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 10**9)]
    assert levels == pytest.approx([2, 2, 2.5, 3, 3, 3.5, 4, 4])
    assert GrowConfig(start=8, hold_kimg=10, fade_kimg=0).level(10_000, 16) == 4
