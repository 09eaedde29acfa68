"""FastGAN's layers against their definitions, and what the discriminator reconstructs."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.tiny import tiny
from trainer.config import LossConfig, ModelConfig, constant
from trainer.launch.checks import problems
from trainer.models import build_discriminator, build_generator
from trainer.models.fastgan import GLU, Excitation, FastGANDiscriminator, FastGANGenerator
from trainer.recipes import resolve
from trainer.step import GAN

TINY = ModelConfig(arch="fastgan", size=32, z_dim=8, g_width=4, d_width=4, max_width=16)
CPU = torch.device("cpu")


def generator(config: ModelConfig = TINY) -> FastGANGenerator:
    torch.manual_seed(0)
    made = build_generator(config)
    assert isinstance(made, FastGANGenerator)
    return made


def discriminator(config: ModelConfig = TINY) -> FastGANDiscriminator:
    torch.manual_seed(0)
    made = build_discriminator(config)
    assert isinstance(made, FastGANDiscriminator)
    return made


def quarters(x: Tensor) -> list[Tensor]:
    """From the upper left to the lower right."""
    return [part for rows in x.chunk(2, 2) for part in rows.chunk(2, 3)]


def test_the_gate_is_that_of_pytorch():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    wanted = torch.randn(2, 3, 4, 4)
    found, expected = ((f(x), *torch.autograd.grad((f(x) * wanted).sum(), x)) for f in (GLU(), lambda x: F.glu(x, 1)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", [4, 16])
def test_excitation_is_one_factor_per_channel_from_the_pooled_map(side: int):
    """Equations 1 and 2 of the paper, sample by sample."""
    torch.manual_seed(0)
    layer = Excitation(3, 5)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    small, large = torch.randn(2, 3, side, side), torch.randn(2, 5, 64, 64)
    found = layer(small, large)
    first, last = layer.layers[0], layer.layers[2]
    for i in range(2):
        pooled = F.adaptive_avg_pool2d(small[i], 4)
        hidden = F.leaky_relu((first.weight * pooled).sum((1, 2, 3)) + first.bias, 0.1)
        factors = (last.weight[:, :, 0, 0] @ hidden + last.bias).sigmoid()
        torch.testing.assert_close(found[i], large[i] * factors[:, None, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "excited"),
    [
        (32, {32: 4}),
        (64, {64: 4}),
        (256, {64: 4, 128: 8, 256: 16}),
        (512, {64: 4, 128: 8, 256: 16, 512: 32}),
    ],
)
def test_large_maps_are_excited_by_those_of_a_sixteenth_of_their_side(size: int, excited: dict[int, int]):
    with torch.device("meta"):
        made = build_generator(replace(TINY, size=size))
        pairs = []
        forward = Excitation.forward

        def spy(self: Excitation, small: Tensor, large: Tensor) -> Tensor:
            pairs.append((large.shape[-1], small.shape[-1]))
            return forward(self, small, large)

        with mock.patch.object(Excitation, "forward", spy):
            made(torch.empty(2, 8))
    assert dict(pairs) == excited


def test_a_latent_is_one_image_whatever_is_beside_it():
    """There is no noise, and batch norm's statistics are fixed."""
    g = generator().eval()
    z = torch.randn(5, 8)
    with torch.no_grad():
        together = g(z)
        torch.testing.assert_close(together[2:3], g(z[2:3]), rtol=1e-4, atol=1e-6)
        assert torch.equal(together, g(z))
    assert together.abs().max() <= 1


@pytest.mark.parametrize(("size", "whole", "part"), [(32, 32, 16), (64, 64, 32), (256, 128, 128), (512, 128, 128)])
def test_reconstructions_have_at_most_128_pixels_a_side(size: int, whole: int, part: int):
    with torch.device("meta"):
        d = build_discriminator(replace(TINY, size=size, max_width=8))
        sides = []
        for decoder in (d.decode_whole, d.decode_part):
            decoder.register_forward_hook(lambda _, inputs, y: sides.append((inputs[0].shape[-1], y.shape[-1])))
        *logits, error = d(*torch.empty(2, 2, 3, size, size), quadrant=0)
    assert sides == [(8, whole), (8, part)]
    assert [x.shape for x in (*logits, error)] == [(2,)] * 3


@pytest.mark.parametrize("quadrant", range(4))
def test_the_error_is_that_of_the_image_and_of_one_quarter(quadrant: int):
    d = discriminator()
    reals, fakes = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    maps = []
    d.layers.register_forward_hook(lambda _, __, y: maps.append(y[:3]))
    whole, part = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 16, 16)
    with (
        mock.patch.object(d.decode_whole, "forward", return_value=whole),
        mock.patch.object(d.decode_part, "forward", return_value=part) as decode,
    ):
        *_, error = d(reals, fakes, quadrant=quadrant)
    torch.testing.assert_close(decode.call_args.args[0], quarters(maps[0])[quadrant])
    expected = (whole - reals).abs().mean((1, 2, 3)) + (part - quarters(reals)[quadrant]).abs().mean((1, 2, 3))
    torch.testing.assert_close(error, expected)


def test_large_images_are_downsampled_before_they_are_compared():
    d = discriminator(replace(TINY, size=256, d_width=1, max_width=2))
    reals, fakes = torch.rand(2, 2, 3, 256, 256) * 2 - 1
    whole, part = F.interpolate(reals, size=128, mode="area"), reals[:, :, 128:, :128]
    with (
        mock.patch.object(d.decode_whole, "forward", return_value=whole),
        mock.patch.object(d.decode_part, "forward", return_value=part),
    ):
        *_, error = d(reals, fakes, quadrant=2)
    torch.testing.assert_close(error, torch.zeros(2), rtol=0, atol=1e-6)


def test_only_reals_are_reconstructed_and_logits_stay_the_same():
    d = discriminator()
    reals, fakes = torch.randn(4, 3, 32, 32), 5 * torch.randn(4, 3, 32, 32)
    with mock.patch("torch.nn.utils.parametrizations._SpectralNorm._power_method"):
        real, fake, error = d(reals, fakes, quadrant=1)
        torch.testing.assert_close(d(reals, fakes), (real, fake))
        _, _, other = d(reals, torch.randn(4, 3, 32, 32), quadrant=1)
    torch.testing.assert_close(error, other, rtol=1e-4, atol=1e-5)


def test_logits_are_means_over_a_map():
    d = discriminator()
    maps = []
    d.critic.register_forward_hook(lambda _, __, y: maps.append(y))
    logits = d.logits(torch.randn(3, 3, 32, 32))
    assert maps[0].shape == (3, 1, 5, 5)
    torch.testing.assert_close(logits, maps[0].mean((1, 2, 3)))


def images(batch: int = 8) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)


def test_quadrants_take_turns_also_after_a_resume():
    seen: list[int | None] = []
    forward = FastGANDiscriminator.forward

    def spy(self: FastGANDiscriminator, *batches: Tensor, quadrant: int | None = None) -> tuple[Tensor, ...]:
        seen.append(quadrant)
        return forward(self, *batches, quadrant=quadrant)

    with mock.patch.object(FastGANDiscriminator, "forward", spy):
        gan = GAN(tiny("fastgan"), CPU)
        for _ in range(3):
            gan.step(images(), 0)
        again = GAN(tiny("fastgan"), CPU)
        again.load_state_dict(gan.state_dict())
        again.step(images(), 0)
        again.step(images(), 0)
        assert seen == [1, None, 2, None, 3, None, 0, None, 1, None], "the generator needs no reconstruction"
        seen.clear()
        gan.logits(images())
        gan.fake_logits(torch.randn(2, 8))
        assert seen == [None, None]


def test_the_reconstruction_trains_the_discriminator():
    """Its weight reaches decoders and encoder; the error of the same images falls."""
    c = tiny("fastgan")
    gradients = {}
    for weight in (0.0, 2.0, 4.0):
        torch.manual_seed(0)
        gan = GAN(replace(c, loss=replace(c.loss, reconstruction=weight)), CPU)
        stats = gan.step(images(), 0)
        gradients[weight] = {n: p.grad.clone() for n, p in gan.discriminator.named_parameters() if p.grad is not None}
        assert "loss/reconstruction" in stats
    for name, gradient in gradients[2.0].items():
        if name.startswith("decode"):
            assert not gradients[0.0][name].any()
        torch.testing.assert_close(2 * gradient - gradients[0.0][name], gradients[4.0][name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(gradients[0.0]["layers.rgb32.0.bias"], gradients[2.0]["layers.rgb32.0.bias"])

    torch.manual_seed(0)
    c = replace(c, optim=replace(c.optim, d_lr=constant(5e-3)))
    gan = GAN(replace(c, augment=replace(c.augment, policy=(), flip=False)), CPU)
    batch = F.interpolate(torch.rand(8, 3, 2, 2), size=32, mode="bilinear") * 2 - 1
    errors = [gan.step(batch, 0)["loss/reconstruction"].item() for _ in range(60)]
    assert sum(errors[-4:]) < 0.6 * sum(errors[:4])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"loss": LossConfig("hinge", gamma=constant(1.0), reconstruction=1.0)},
            "--model.arch fastgan, whose batch norm",
        ),
        ({"loss": LossConfig("hinge", gp=1.0, reconstruction=1.0)}, "--model.arch fastgan, whose batch norm"),
        ({"loss": LossConfig("hinge", reconstruction=-1.0)}, "--loss.reconstruction -1: give 0 or more"),
        ({"model": replace(TINY, arch="dcgan")}, "it is an option of fastgan"),
        ({"model": replace(TINY, d_norm="none")}, "are options of dcgan"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], message: str):
    config = replace(resolve("fastgan-64", None, gpu=False), **values)  # type: ignore[arg-type]
    assert message in "\n".join(problems(config))
