"""StyleGAN2's layers against their definitions, and path length regularisation."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.tiny import tiny
from trainer.config import ModelConfig
from trainer.models import build_generator
from trainer.models.stylegan2 import (
    Mapping,
    StyledConv,
    StyleGAN2Generator,
    blur,
    demodulation,
    downsample,
    mix_styles,
    modulated_conv,
    upsample,
)
from trainer.path_length import PathLength, path_lengths
from trainer.step import GAN

TINY = ModelConfig(arch="stylegan2", size=16, z_dim=8, g_width=4, max_width=8)
CPU = torch.device("cpu")


def generator(config: ModelConfig = TINY) -> StyleGAN2Generator:
    torch.manual_seed(0)
    made = build_generator(config)
    assert isinstance(made, StyleGAN2Generator)
    return made


def images(batch: int = 8) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_modulated_convolution_has_weights_of_its_own_for_each_sample(kernel: int):
    """Equations 1 and 3 of the paper, sample by sample."""
    torch.manual_seed(0)
    x, weight, style = torch.randn(3, 5, 8, 8), torch.randn(6, 5, kernel, kernel), torch.randn(3, 5)
    found = modulated_conv(x, weight, style) * demodulation(weight, style)[:, :, None, None]
    for i in range(3):
        modulated = weight * style[i][None, :, None, None]
        modulated = modulated / (modulated.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = F.conv2d(x[i : i + 1], modulated, padding=kernel // 2)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_demodulation_gives_unit_variance():
    """Whatever the styles; away from the border."""
    torch.manual_seed(0)
    x, weight, style = torch.randn(4, 32, 64, 64), 3 * torch.randn(8, 32, 3, 3), 10 * torch.rand(4, 32)
    y = modulated_conv(x, weight, style) * demodulation(weight, style)[:, :, None, None]
    deviation = y[..., 1:-1, 1:-1].std((2, 3))
    torch.testing.assert_close(deviation, torch.ones(4, 8), rtol=0.05, atol=0.0)


def test_a_layer_is_convolution_bias_leaky_relu_and_gain():
    torch.manual_seed(0)
    layer = StyledConv(4, 6, 8)
    torch.nn.init.normal_(layer.bias)
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    style, factor = layer.modulation(w)
    y = modulated_conv(x, layer.weight * layer.scale, style) * factor[:, :, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, style, factor), 2**0.5 * F.leaky_relu(y, 0.2))


def test_resampling_filters_are_1_3_3_1():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 3, 4] = 1.0
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(upsample(x)[0, 0, 5:9, 7:11], torch.outer(taps, taps) / 16)
    assert upsample(x).count_nonzero() == 16
    torch.testing.assert_close(blur(x)[0, 0, 2:6, 3:7], torch.outer(taps, taps) / 64)
    random = torch.randn(2, 3, 8, 8)
    # Every second pixel, of a map that has half a pixel more on each side.
    torch.testing.assert_close(downsample(random), blur(random)[:, :, 1::2, 1::2])


def test_the_mapping_network_learns_a_hundred_times_slower():
    """Its output moves by a hundredth of what a step of the same size does to an ordinary layer."""
    torch.manual_seed(0)
    mapping = Mapping(64, 64, 2)
    z = torch.randn(256, 64)
    before = mapping(z)
    assert before.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.2)
    assert mapping.layers[0].weight.std().item() == pytest.approx(100.0, rel=0.1)
    torch.testing.assert_close(mapping(5 * z), before)
    with torch.no_grad():
        mapping.layers[1].weight += 1.0
    change = (mapping(z) - before).square().mean().sqrt().item()
    assert change < 0.2, "a step of one would change the output of an ordinary layer by about as much as it is"


def test_psi_zero_is_the_mean_image_for_every_latent():
    g = generator()
    g.measure([torch.randn(64, 8) for _ in range(4)])
    zero, half, one = torch.tensor(0.0), torch.tensor(0.5), torch.tensor(1.0)
    with torch.no_grad():
        z = torch.randn(5, 8)
        truncated = g(z, psi=zero)
        torch.testing.assert_close(truncated, truncated[:1].expand(5, -1, -1, -1))
        assert truncated.std() > 0.01
        torch.testing.assert_close(g(z, psi=one), g(z), rtol=1e-4, atol=1e-5)
        w = g.mapping(z)
        expected = g(z, offset=g.mean_w + 0.5 * (w - g.mean_w) - w)
        torch.testing.assert_close(g(z, psi=half), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_w_is_measured_for_the_ema_weights_and_saved():
    gan = GAN(tiny("stylegan2"), CPU)
    gan.step(images(), 0)
    gan.ema.update(gan.generator, 8, 8)
    random = torch.get_rng_state()
    gan.recompute_ema_statistics()
    assert torch.equal(torch.get_rng_state(), random)
    mean = gan.state_dict()["ema"]["mean_w"]
    w = gan.ema.module.mapping(torch.randn(20_000, 8))
    assert ((w.mean(0) - mean).abs() < 5 * w.std(0) / 1024**0.5).all()
    assert mean.abs().max() > 0.05


def test_styles_are_mixed_from_a_random_layer_on():
    torch.manual_seed(0)
    z, other = torch.zeros(4000, 3), torch.ones(4000, 3)
    mixed = mix_styles(z, other, 5, 0.9)
    assert mixed.shape == (4000, 5, 3)
    layers = mixed[..., 0]
    assert torch.equal(layers, layers.sort(1).values), "a latent came back"
    assert not layers[:, 0].any()
    counts = layers.sum(1).long().bincount(minlength=5) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.225, 0.225, 0.225, 0.225]), rtol=0, atol=0.03)
    assert torch.equal(mix_styles(z, other, 5, 0.0), torch.zeros(4000, 5, 3))


def test_a_latent_for_each_style_of_one_latent_is_that_latent():
    g = generator()
    z = torch.randn(3, 8)
    torch.testing.assert_close(g(z[:, None].expand(-1, g.num_styles, -1)), g(z))
    other = z[:, None].repeat(1, g.num_styles, 1)
    other[:, -1] += 1  # the last convolution's, and so ToRGB's
    assert not torch.allclose(g(other), g(z))


def test_styles_are_mixed_in_training_only():
    gan = GAN(tiny("stylegan2"), CPU)
    assert gan.config.loss.style_mixing == 0.9
    seen = []
    forward = StyleGAN2Generator.forward

    def spy(self: StyleGAN2Generator, z: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        seen.append((self.training, z.ndim))
        return forward(self, z, *args, **kwargs)

    with mock.patch.object(StyleGAN2Generator, "forward", spy):
        gan.step(images(), 0)
        assert set(seen) == {(True, 3), (True, 2)}, "the path length penalty is that of one latent"
        seen.clear()
        z = torch.randn(2, 8)
        gan.sample(z)
        gan.sample(z, raw=True)
        gan.fake_logits(z)
        assert set(seen) == {(False, 2)}


def test_path_lengths_are_the_derivatives_finite_differences_find():
    """|J^T y| and its gradient with respect to a parameter, in double precision."""
    g = generator(replace(TINY, size=8, g_width=2, max_width=4, z_dim=3)).double()
    z, direction = torch.randn(2, 3, dtype=torch.double), torch.randn(2, 3, 8, 8, dtype=torch.double)

    def lengths() -> Tensor:
        offset = torch.zeros(2, 3, dtype=torch.double, requires_grad=True)
        with mock.patch("trainer.path_length.random_direction", return_value=direction):
            return path_lengths(g(z, offset), offset)

    step = 1e-6
    slopes = torch.stack(
        [
            ((g(z, step * e) - g(z, -step * e)) * direction).sum((1, 2, 3)) / (2 * step)
            for e in torch.eye(3, dtype=torch.double).unsqueeze(1).expand(-1, 2, -1)
        ],
        dim=1,
    )
    found = lengths()
    torch.testing.assert_close(found, slopes.norm(dim=1), rtol=1e-6, atol=1e-8)

    weight = g.layers["conv4"].weight
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    with torch.no_grad():
        weight[1, 2, 0, 1] += step
    above = lengths().sum()
    with torch.no_grad():
        weight[1, 2, 0, 1] -= 2 * step
    below = lengths().sum()
    assert gradient[1, 2, 0, 1].abs() > 1e-3
    assert ((above - below) / (2 * step)).item() == pytest.approx(gradient[1, 2, 0, 1].item(), rel=1e-5)


def test_the_path_length_of_a_linear_generator_is_known():
    """J is a matrix with orthogonal rows of length 3: |J^T y| is 3 |y| of the directions it spans."""
    w = torch.randn(1000, 4, requires_grad=True)
    found = path_lengths((3 * w).reshape(1000, 1, 2, 2), w)
    assert found.square().mean().item() == pytest.approx(9 * 4 / 4, rel=0.1)


def test_the_running_mean_starts_at_the_first_batch_and_then_moves_slowly():
    path = PathLength(CPU)
    assert path.penalty(torch.tensor([1.0, 3.0])).item() == pytest.approx(1.0)
    assert path.mean.item() == pytest.approx(2.0)
    path.num_updates = 1000
    path.penalty(torch.tensor([12.0]))
    assert path.mean.item() == pytest.approx(2.1)
    again = PathLength(CPU)
    again.load_state_dict(path.state_dict())
    assert (again.mean.item(), again.num_updates) == (path.mean.item(), 1001)


def test_penalties_come_every_so_many_steps():
    c = tiny("stylegan2")
    gan = GAN(replace(c, loss=replace(c.loss, penalty_every=3, path_every=2)), CPU)
    stats = [gan.step(images(), 0) for _ in range(5)]
    assert ["loss/r1r2" in s for s in stats] == [True, False, False, True, False]
    assert ["loss/path_length" in s for s in stats] == [True, False, True, False, True]


def test_r1_is_that_of_reals_alone():
    c = tiny("stylegan2")
    reals, fakes = torch.randn(2, 256, 3, 32, 32)
    found = {}
    for penalty in ("exact", "finite-difference"):
        for r2 in (True, False):
            torch.manual_seed(0)
            gan = GAN(replace(c, loss=replace(c.loss, r2=r2, penalty=penalty)), CPU)
            stats: dict[str, Tensor] = {}
            gan.num_steps, gan.scale = 1, 1 / 256
            gan._discriminator_loss(reals, 10 * fakes, stats)
            found[penalty, r2] = stats["loss/r1r2"].item()
    torch.manual_seed(0)
    gan = GAN(c, CPU)
    x = reals.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gan.discriminator(x)[0].sum(), x)
    assert found["exact", False] == pytest.approx(gradient.square().sum((1, 2, 3)).mean().item(), rel=1e-4)
    assert found["exact", True] > 1.3 * found["exact", False]
    # The standard error of 256 estimates is 9%.
    assert found["finite-difference", False] == pytest.approx(found["exact", False], rel=0.3)
    assert found["finite-difference", True] > 1.3 * found["finite-difference", False]
