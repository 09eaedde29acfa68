"""BigGAN's self-attention against its definition, and spectral norm in training, in the EMA and in files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from export.generator import USUAL_ABS_DIFF, export_onnx
from tests.trainer.tiny import tiny
from trainer.checkpoints import checkpoint
from trainer.checkpoints.storage import Storage
from trainer.checkpoints.transfer import init_from
from trainer.config import Config, constant
from trainer.models import build_discriminator, build_generator
from trainer.models.biggan import SelfAttention
from trainer.recipes import resolve
from trainer.step import GAN

CPU = torch.device("cpu")
Layers = dict[str, nn.Module]


def layers(module: nn.Module) -> Layers:
    """All convolutions, linear layers and embeddings."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)}


def largest(layer: nn.Module) -> float:
    """The largest singular value of a layer's weight as it is used, by another algorithm than the code's."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.linalg.svdvals(weight.detach().flatten(1))[0].item()


@pytest.fixture(scope="module")
def trained() -> GAN:
    """After steps that change the weights much, with self-attention in use and an EMA that is far behind."""
    c = tiny("biggan", 16)
    c = replace(c, optim=replace(c.optim, g_lr=constant(5e-3), d_lr=constant(5e-3)), model=replace(c.model, g_width=8))
    torch.manual_seed(0)
    gan = GAN(replace(c, model=replace(c.model, classes=("a", "b"))), CPU)
    for step in range(40):
        reals, labels = torch.rand(8, 3, 16, 16) * 2 - 1, torch.arange(8) % 2
        gan.step(reals, step * 8, labels=labels)
        gan.ema.update(gan.generator, 8, (step + 1) * 8)
    gan.recompute_ema_statistics()
    return gan


@pytest.mark.parametrize("channels", [16, 4])
def test_attention_is_a_softmax_over_the_pixels_of_the_pooled_keys(channels: int) -> None:
    """Pixel by pixel."""
    torch.manual_seed(0)
    layer = SelfAttention(channels)
    nn.init.constant_(layer.gain.weight, 0.7)
    inner, half = max(channels // 8, 1), channels // 2
    shapes = {name: tuple(p.shape[:2]) for name, p in layer.named_parameters() if p.ndim}
    assert shapes == {
        "query.weight": (inner, channels),
        "key.weight": (inner, channels),
        "value.weight": (half, channels),
        "out.weight": (channels, half),
    }
    x = torch.randn(2, channels, 4, 6)
    query, key, value, out = (p.detach()[:, :, 0, 0] for p in layer.parameters() if p.ndim)

    def pooled(matrix: Tensor, image: Tensor) -> list[Tensor]:
        """The maximum over each 2x2 pixels of each channel."""
        return [
            torch.stack([matrix @ image[:, i + a, j + b] for a in (0, 1) for b in (0, 1)]).amax(0)
            for i in range(0, 4, 2)
            for j in range(0, 6, 2)
        ]

    found = layer(x)
    for image, result in zip(x, found, strict=True):
        keys, values = pooled(key, image), pooled(value, image)
        for i in range(4):
            for j in range(6):
                scores = torch.stack([(query @ image[:, i, j]) @ k for k in keys])
                weights = scores.exp() / scores.exp().sum()
                attended = sum(w * v for w, v in zip(weights, values, strict=True))
                expected = image[:, i, j] + 0.7 * (out @ attended)
                torch.testing.assert_close(result[:, i, j], expected, rtol=1e-4, atol=1e-5)


def test_attention_starts_as_the_identity_and_learns_to_be_another_map() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(8), torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), x)
    F.mse_loss(layer(x), torch.randn_like(x)).backward()
    assert layer.gain.weight.grad is not None
    assert layer.gain.weight.grad.abs() > 1e-3


@pytest.mark.parametrize(("size", "side"), [(32, 16), (64, 32), (128, 64), (256, 64), (512, 64)])
def test_the_recipe_has_both_and_attention_at_64x64_or_half_the_side(size: int, side: int) -> None:
    c = resolve(f"biggan-{size}", None, gpu=False).model
    assert (c.attention, c.g_spectral_norm) == (side, True)


@pytest.mark.parametrize("side", [8, 16])
def test_attention_is_once_in_each_network_at_the_given_side(side: int) -> None:
    model = replace(tiny("biggan", 32).model, attention=side)
    networks, seen = (build_generator(model), build_discriminator(model)), []
    for module in networks:
        for part in module.modules():
            if isinstance(part, SelfAttention):
                part.register_forward_hook(lambda _, inputs, y: seen.append((*inputs[0].shape[2:], *y.shape[2:])))
    networks[1](networks[0](torch.randn(2, 8)))
    assert seen == [(side,) * 4] * 2


def test_the_recipe_for_cpus_has_neither() -> None:
    c = resolve("biggan-cpu-32", None, gpu=False).model
    assert (c.attention, c.g_spectral_norm) == (0, False)
    generator = build_generator(c)
    assert not any(isinstance(part, SelfAttention) or is_parametrized(part) for part in generator.modules())


@pytest.mark.parametrize("g_spectral_norm", [True, False])
def test_which_layers_of_the_networks_are_normalised(g_spectral_norm: bool) -> None:
    model = replace(tiny("biggan", 16).model, classes=("a", "b"), g_spectral_norm=g_spectral_norm)
    for name, layer in layers(build_generator(model)).items():
        assert is_parametrized(layer) == (".attention." in name or (g_spectral_norm and name != "embedding")), name
    assert all(is_parametrized(layer) for layer in layers(build_discriminator(model)).values())


def test_norms_are_one_in_training_and_of_the_ema(trained: GAN) -> None:
    """In training about, since the power iteration follows the weights; of the average exactly."""
    normalised = {n: layer for n, layer in layers(trained.generator).items() if n != "embedding"}
    assert len(normalised) > 15
    before = layers(build_generator(trained.config.model))
    for name, layer in normalised.items():
        assert largest(layer) == pytest.approx(1, abs=0.05), name
        moved = layer.parametrizations.weight.original - before[name].parametrizations.weight.original  # type: ignore[union-attr]
        assert moved.norm() > 0.1, name
        average = layers(trained.ema.module)[name]
        assert largest(average) == pytest.approx(1, abs=1e-4), name
        assert not torch.equal(average.weight, layer.weight), name
    assert trained.generator.blocks["up8"].attention.gain.weight.abs() > 1e-3


def vectors(module: nn.Module) -> Iterator[Tensor]:
    return (t for name, t in module.named_buffers() if name.endswith(("._u", "._v")))


def test_the_vectors_of_the_ema_depend_on_its_weights_alone(trained: GAN) -> None:
    """With those of training, or its first ones, the norms would be wrong."""
    module = trained.ema.module
    right = [t.clone() for t in vectors(module)]
    for name in ("training", "random"):
        for own, other in zip(vectors(module), vectors(trained.generator), strict=True):
            own.copy_(other if name == "training" else F.normalize(torch.randn_like(own), dim=0))
        assert max(largest(layer) for n, layer in layers(module).items() if n != "embedding") > 1.0005, name
        trained.recompute_ema_statistics()
        assert all(torch.equal(t, own) for t, own in zip(right, vectors(module), strict=True))
    assert not module.training


def test_the_file_has_the_normalised_weights(trained: GAN, tmp_path: Path) -> None:
    generator = trained.ema.module
    assert export_onnx(generator, tmp_path / "gen.onnx", {}) <= USUAL_ABS_DIFF
    graph = onnx.load(tmp_path / "gen.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"Softmax", "MaxPool", "MatMul"} <= kinds
    assert not kinds & {"Div", "Sqrt", "ReduceSum", "ReduceL2", "Shape", "Slice", "Expand"}
    constants = [numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer]
    for name, layer in layers(generator).items():
        weight = layer.weight.detach().numpy()  # type: ignore[operator, union-attr]
        same = [c for c in constants if c.shape in (weight.shape, weight.T.shape)]
        assert min(min(np.abs(c - w).max() for w in (weight, weight.T) if w.shape == c.shape) for c in same) < 1e-6, (
            name
        )
    assert all(c.ndim != 1 or abs(np.square(c).sum() - 1) > 1e-6 for c in constants), "u and v"


def test_another_training_starts_with_the_images_of_the_ema(trained: GAN, tmp_path: Path) -> None:
    state = {"nimg": 320, "config": trained.config.to_dict(), **trained.state_dict()}
    Storage(tmp_path).save(checkpoint.folder_name(320), checkpoint.encode(state))
    torch.manual_seed(5)
    gan = GAN(trained.config, CPU)
    assert init_from(gan, tmp_path).count("100% of the values") == 2
    z, label = torch.randn(4, 8), torch.arange(4) % 2
    for raw in (True, False):
        assert torch.equal(gan.sample(z, raw=raw, label=label), trained.sample(z, label=label))

    # At another size, self-attention is at another map.
    larger = tiny("biggan", 32).model
    config = replace(trained.config, model=replace(trained.config.model, size=32, attention=larger.attention))
    report = init_from(GAN(config, CPU), tmp_path).split("discriminator")[0]
    assert " blocks.up16.attention.gain" in report.split("not used")[0]
    assert " blocks.up8.attention.gain" in report.split("not used")[1]


@pytest.mark.parametrize("num", [3, 5])
def test_frozen_layers_are_those_next_to_the_image(num: int) -> None:
    """Three are those of the first block, the next ones are of its self-attention."""
    c = tiny("biggan", 16)
    torch.manual_seed(0)
    gan = GAN(replace(c, optim=replace(c.optim, freeze_d=num)), CPU)
    before = {name: value.clone() for name, value in gan.discriminator.named_parameters()}
    for step in range(3):  # in the first one the gain is 0, and self-attention has no gradient
        gan.step(torch.rand(8, 3, 16, 16) * 2 - 1, step * 8)
    kept = [name for name, value in gan.discriminator.named_parameters() if torch.equal(value, before[name])]
    assert kept == [name for name, value in gan.discriminator.named_parameters() if not value.requires_grad]
    of_layers = {name.split(".parametrizations")[0].removesuffix(".bias") for name in kept if "gain" not in name}
    block = ["blocks.down8." + name for name in ("conv1", "conv2", "skip", "attention.query", "attention.key")]
    assert of_layers == set(block[:num])


def test_a_configuration_of_an_earlier_version_has_neither() -> None:
    values = resolve("biggan-64", None, gpu=False).to_dict()
    for name in ("attention", "g_spectral_norm"):
        del values["model"][name]
    model = Config.from_dict(values).model
    assert (model.attention, model.g_spectral_norm) == (0, False)
