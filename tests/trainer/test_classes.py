"""Conditional models: they learn the classes, on any number of ranks, and resume exactly."""

from __future__ import annotations

import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from catgan.command import UserError
from catgan.dataset import Manifest
from tests.trainer.data.coloured import COLOURS, SIZE, seen, write_coloured
from tests.trainer.test_loop import Notes, Requests, run, same, without_times
from tests.trainer.tiny import tiny
from trainer.checkpoints import checkpoint
from trainer.config import AugmentConfig, Config, EMAConfig, ModelConfig, OptimConfig, ProjectedConfig, constant
from trainer.data.stream import share
from trainer.launch import driver
from trainer.launch.checks import problems
from trainer.models import build_discriminator, build_generator
from trainer.models.common import ClassProjection
from trainer.step import GAN
from trainer.tracking.grids import fake_grid, real_grid

BATCH = 6
ARCHITECTURES = ("dcgan", "r3gan", "stylegan2", "biggan")


def conditional(family: str, size: int = SIZE, batch: int = BATCH) -> Config:
    c = tiny(family, size, batch)
    return replace(c, model=replace(c.model, conditional=True, classes=COLOURS))


def without_chance(family: str) -> Config:
    """Without what each rank draws for itself."""
    c = conditional(family)
    return replace(c, augment=AugmentConfig(flip=False), loss=replace(c.loss, style_mixing=0.0))


CASES = {
    **{arch: without_chance(arch) for arch in ARCHITECTURES},
    "biggan, accumulated": replace(without_chance("biggan"), accumulate=2),
    "r3gan-cpu, finite differences": replace(
        without_chance("r3gan-cpu"), loss=replace(without_chance("r3gan-cpu").loss, penalty="finite-difference")
    ),
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_coloured(tmp_path_factory.mktemp("coloured") / "set")


def steps(c: Config, rank: int, world_size: int) -> dict[str, Tensor]:
    """Gradients and weights after four steps on fixed reals, classes and latents, this rank's share of them."""
    torch.manual_seed(0)
    gan = GAN(c, torch.device("cpu"), world_size)
    for module in (gan.generator, gan.discriminator):
        for p in module.parameters():
            if not p.any():  # r3gan's blocks start with a zero layer
                torch.nn.init.normal_(p, 0.0, 0.1)
    for optimiser in (gan.g_optimiser, gan.d_optimiser):
        optimiser.param_groups[0]["eps"] = 1e-3  # Adam's usual one would blow up rounding
    random = torch.Generator().manual_seed(1)
    start, stop = share(BATCH, rank, world_size)
    drawn = mock.patch.multiple(
        "trainer.step", perturb=lambda images: images + 0.01 * images.flip(2), interpolate=lambda a, b: a.lerp(b, 0.5)
    )
    direction = mock.patch("trainer.path_length.random_direction", lambda images: images.detach().flip(2) / SIZE)
    with drawn, direction, mock.patch.object(GAN, "_latents", _next_latents(start, stop)):
        for step in range(4):
            reals = (torch.rand(BATCH, 3, SIZE, SIZE, generator=random) * 2 - 1)[start:stop]
            labels = torch.randint(3, (BATCH,), generator=random)[start:stop]
            more = (reals.flip(3), labels.flip(0)) if gan.fresh_reals else (None, None)
            if world_size == 1 and more[1] is not None:  # as two ranks of three images see them
                more = (reals.flip(3), labels.reshape(2, 3).flip(1).flatten())
            gan.step(reals, step * BATCH, more[0], labels, more[1])
    networks = {"g": gan.generator, "d": gan.discriminator}
    grads = {f"grad.{n}.{k}": p.grad for n, m in networks.items() for k, p in m.named_parameters()}
    found = {key: g.clone() for key, g in grads.items() if g is not None}
    return found | {f"{n}.{key}": t for n, m in networks.items() for key, t in m.state_dict().items()}


def _next_latents(start: int, stop: int) -> Any:
    random, taken = torch.Generator().manual_seed(2), {"rows": BATCH}

    def latents(self: GAN, reals: Tensor) -> Tensor:
        """The next rows of this rank's share of a batch of latents."""
        if taken["rows"] + len(reals) > stop - start:
            taken["z"], taken["rows"] = torch.randn(BATCH, 8, generator=random)[start:stop], 0  # type: ignore[assignment]
        first = taken["rows"]
        taken["rows"] = first + len(reals)
        return taken["z"][first : first + len(reals)]  # type: ignore[index]

    return latents


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=300))
    for name, c in CASES.items():
        torch.save(steps(c, rank, 2), Path(folder) / f"{name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (port, str(folder)), 2)
    return folder


@pytest.mark.parametrize("name", [name for name in CASES if "accumulated" not in name])
def test_two_ranks_equal_one_process_with_the_whole_batch(ranks: Path, name: str) -> None:
    alone = steps(CASES[name], 0, 1)
    assert any("embedding" in key and key.startswith("grad.g") for key in alone)
    assert any("projection" in key and key.startswith("grad.d") for key in alone)
    for rank in range(2):
        together = torch.load(ranks / f"{name}.{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=5e-4, atol=3e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_ranks_with_accumulation_stay_equal(ranks: Path) -> None:
    a, b = (torch.load(ranks / f"biggan, accumulated.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_class_has_an_effect_in_both_networks_of_its_own_image_only(arch: str) -> None:
    torch.manual_seed(0)
    c = conditional(arch)
    g, d = build_generator(c.model).eval(), build_discriminator(c.model).eval()
    g.measure([torch.randn(16, 8)])
    z, label, other = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 1])
    images = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    for module, x in ((g, z), (d, images)):
        a, b = ((out[0] if isinstance(out := module(x, label=y), tuple) else out) for y in (label, other))
        torch.testing.assert_close(a[:3], b[:3])
        assert (a[3] - b[3]).abs().max() > 1e-5, type(module)
    with pytest.raises(AssertionError, match="a label for each latent"):
        g(z)


@pytest.mark.parametrize("arch", ["dcgan", "r3gan", "biggan"])
def test_latents_decide_more_than_the_class_before_training(arch: str) -> None:
    torch.manual_seed(0)
    c = conditional(arch)
    g = build_generator(replace(c.model, z_dim=64)).eval()
    z = torch.randn(128, 64)
    with torch.no_grad():
        first = torch.stack([g.features(z, label=torch.full((128,), y)) for y in range(3)])
    over_latents, over_classes = first.std(1).mean(), first.mean(1).std(0).mean()
    assert 0 < over_classes < 0.3 * over_latents


def test_the_projection_is_an_inner_product_and_comes_once_for_each_batch() -> None:
    projection = ClassProjection(3, 2, deviation=1.0, gain=0.5)
    with torch.no_grad():
        projection.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    features = torch.tensor([[5.0, 7.0], [5.0, 7.0], [1.0, -1.0]])
    assert projection(features, torch.tensor([0, 1, 2])).tolist() == [2.5, 7.0, 0.0]
    d = build_discriminator(conditional("r3gan-cpu").model).eval()
    images, label = torch.rand(3, 3, SIZE, SIZE), torch.tensor([2, 0, 1])
    for logits in d(images, images, images, label=label):
        torch.testing.assert_close(logits, d.logits(images, label=label))


def test_truncation_keeps_the_class() -> None:
    torch.manual_seed(0)
    g = build_generator(conditional("stylegan2").model).eval()
    g.measure([torch.randn(64, 8)], [torch.zeros(64, dtype=torch.long)])
    label = torch.tensor([0, 0, 1, 2])
    with torch.no_grad():
        mean = g(torch.randn(4, 8), psi=torch.tensor(0.0), label=label)
        w = g.features(torch.randn(4096, 8), label=torch.ones(4096, dtype=torch.long)).mean(0)
    torch.testing.assert_close(mean[0], mean[1])
    assert (mean[1] - mean[2]).abs().max() > 1e-4
    assert (g.mean_w[1] - w).norm() < (g.mean_w[0] - w).norm()


@pytest.mark.parametrize("arch", ["dcgan", "biggan"])
def test_solid_colours_are_learned_by_class(arch: str) -> None:
    """Reals of one colour for each class: the generated images of a class get its colour."""
    c = conditional(arch, size=8, batch=12)
    c = replace(
        c,
        model=replace(
            c.model, d_norm="none" if arch == "dcgan" else "batch", g_width=16, d_width=16, max_width=16, attention=0
        ),
        loss=replace(c.loss, name="hinge", n_critic=1, share_batch=True),
        augment=AugmentConfig(flip=False),
        optim=OptimConfig(g_lr=constant(2e-3), d_lr=constant(2e-3), beta1=0.0, beta2=constant(0.9)),
        ema=EMAConfig(half_life_kimg=0.1, ramp=0.5),
    )
    torch.manual_seed(0)
    gan = GAN(c, torch.device("cpu"))
    label = torch.arange(12) % 3
    reals = torch.full((12, 3, 8, 8), -0.8)
    for image, channel in zip(reals, (2 - label).tolist(), strict=True):  # blue, green, red
        image[channel] = 0.8
    for step in range(100):
        gan.step(reals, step * 12, labels=label)
        gan.ema.update(gan.generator, 12, (step + 1) * 12)
    gan.recompute_ema_statistics()
    images = gan.sample(torch.randn(48, 8), label=torch.arange(48) % 3)
    assert (seen(images) == torch.arange(48) % 3).float().mean() > 0.9


def test_statistics_of_the_ema_are_those_of_the_classes_in_the_proportions_of_the_data() -> None:
    """What comes before the first batch norm is affine in the latent and in the embedding of the class."""
    torch.manual_seed(0)
    c = conditional("dcgan")
    gan = GAN(replace(c, model=replace(c.model, g_head="conv")), torch.device("cpu"))

    def mean(*counts: int) -> Tensor:
        gan.class_counts = counts
        gan.recompute_ema_statistics()
        found = gan.ema.module.layers.norm4.running_mean
        assert isinstance(found, Tensor)
        return found.clone()

    assert gan.class_counts == (1, 1, 1)
    blue, green, red = mean(7, 0, 0), mean(0, 7, 0), mean(0, 0, 7)
    most = 3 / 1024 * ((blue - green).abs() + (red - green).abs()).max()
    assert (mean(95, 0, 5) - (0.95 * blue + 0.05 * red)).abs().max() < most
    assert (mean(95, 0, 5) - (0.5 * blue + 0.5 * red)).abs().max() > 10 * most
    assert (mean(1, 1, 1) - (blue + green + red) / 3).abs().max() < most


@pytest.mark.usefixtures("tiny_extractor")
def test_resuming_is_bit_for_bit_as_if_uninterrupted(coloured: Manifest, tmp_path: Path) -> None:
    config = conditional("dcgan-cpu", batch=8)
    config = replace(config, projected=ProjectedConfig(), track=replace(config.track, grid=6))
    whole, parts = Notes(), Notes()
    counts = coloured.splits["train"].class_counts
    seen_counts, recompute = [], GAN.recompute_ema_statistics

    def noted(gan: GAN) -> None:
        seen_counts.append(gan.class_counts)
        recompute(gan)

    with mock.patch.object(GAN, "recompute_ema_statistics", noted):
        run(config, coloured, tmp_path / "whole", whole)
    assert set(seen_counts) == {counts}, "the statistics are those of the data's classes"
    run(replace(config, kimg=0.064), coloured, tmp_path / "parts", parts)
    run(config, coloured, tmp_path / "parts", parts, context=Requests("stop"))
    run(config, coloured, tmp_path / "parts", parts)
    a, b = (checkpoint.load(checkpoint.find_all(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert a["nimg"] == 192
    assert same(without_times(a), without_times(b))
    assert a["last_metric"]["class_counts"] == list(counts)
    other = replace(coloured, labels=("blue", "green", "rot"))
    with pytest.raises(UserError, match="other classes than the training began with"):
        run(config, other, tmp_path / "parts", parts)


def test_sheets_have_a_row_for_each_class(coloured: Manifest) -> None:
    config = replace(conditional("dcgan-cpu"), track=replace(conditional("dcgan-cpu").track, grid=14))
    reals = np.asarray(real_grid(coloured, config))
    rows = torch.tensor(reals).reshape(3, SIZE, 4, SIZE, 3).permute(0, 2, 4, 1, 3)
    for label, row in enumerate(rows):
        assert seen(row).tolist() == [label] * 4
    gan = GAN(config, torch.device("cpu"))

    def shades(self: GAN, z: Tensor, raw: bool, label: Tensor) -> Tensor:
        return (z[:, 0] / 10 + label / 10)[:, None, None, None].expand(-1, 3, SIZE, SIZE)

    with mock.patch.object(GAN, "sample", shades):
        fakes = np.asarray(fake_grid(gan)).reshape(3, SIZE, 4, SIZE, 3)[:, 0, :, 0, 0].astype(int)
    steps_of_label = np.diff(fakes, axis=0)
    assert ((steps_of_label == 12) | (steps_of_label == 13)).all(), "the same latent and the next label in each row"
    few = replace(config, track=replace(config.track, grid=2))
    assert np.asarray(real_grid(coloured, few)).shape == (2 * SIZE, SIZE, 3)


def options(*words: object) -> list[str]:
    return [str(word) for word in words] + ["--workers", "0", "--dry-run"]


def test_a_conditional_recipe_takes_the_classes_of_its_data(coloured: Manifest, shards: Path, tmp_path: Path) -> None:
    out = ["--model.size", SIZE, "--eval.extractor", "efflite0", "--out", tmp_path]
    found = driver.main(options("biggan-cpu", "--data", coloured.root, *out))
    assert found["config"]["model"]["classes"] == COLOURS
    found = driver.main(options("dcgan-cpu", "--data", coloured.root, *out))
    assert found["config"]["model"]["classes"] == ()
    found = driver.main(options("biggan-cpu-32", "--out", tmp_path))
    assert "tuxedo" in found["config"]["model"]["classes"]
    for words, part in (
        (["biggan-cpu-32", "--data", shards], "has none: build it with `catdata build --labels folder`"),
        (["biggan-cpu-32", "--data", shards], "train without classes: --model.no-conditional"),
        (["dcgan-cpu-32", "--data", shards, "--model.conditional"], "has none: build it"),
        (["dcgan-cpu-32", "--data", shards, "--model.classes", "a"], "leave it out"),
        (["biggan-cpu", "--data", coloured.root, "--model.classes", "a", *out], "leave it out"),
        (["progan-cpu", "--data", coloured.root, "--model.conditional", *out], "whose networks take no classes"),
    ):
        with pytest.raises(UserError) as caught:
            driver.main(options(*words))
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_data_sets_of_earlier_versions_and_names_that_cannot_be_exported(coloured: Manifest, tmp_path: Path) -> None:
    from trainer.launch.classes import with_classes

    given: Any = SimpleNamespace(model=ModelConfig(conditional=True), recipe="biggan", data="d")
    splits = {name: replace(split, class_counts=()) for name, split in coloured.splits.items()}
    for manifest, part in (
        (replace(coloured, splits=splits), "built by an earlier version"),
        (replace(coloured, labels=("x" * 101, "b", "c")), r"the name 'x+', allowed are 1 to 100"),
        (replace(coloured, labels=tuple(map(str, range(1001)))), "1,001 names"),
        (replace(coloured, labels=("a\u200db", "b", "c")), "printable characters"),
        (replace(coloured, labels=("a", "b", "a")), "a name twice"),
        (replace(coloured, labels=("a", " b", "c")), "the name ' b'"),
        (replace(coloured, labels=("a", "", "c")), "the name ''"),
    ):
        with pytest.raises(UserError, match=part):
            with_classes(given, manifest)


def test_finite_differences_are_refused_with_spectral_norm() -> None:
    c = conditional("biggan")
    c = replace(c, loss=replace(c.loss, gamma=constant(1.0), penalty="finite-difference"))
    assert any("spectral norm" in problem for problem in problems(c))
