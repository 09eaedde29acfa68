"""The step: two ranks are one process with the whole batch; phases touch only their own network."""

import copy
import functools
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import BatchNorm2d, Conv2d, Linear
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.parametrizations import spectral_norm

from tests.trainer.tiny import tiny
from trainer.config import (
    AugmentConfig,
    Config,
    GrowConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ProjectedConfig,
    Schedule,
    constant,
)
from trainer.data.stream import share
from trainer.distributed.parallel import freeze_first, frozen
from trainer.losses import LOSSES
from trainer.models import resize_to_level
from trainer.recipes import FAMILIES
from trainer.step import GAN

BATCH, SIZE = 6, 16


def config(loss: str = "bce", gamma: float = 0.0, every: int = 1, arch: str = "dcgan", norm: str = "none") -> Config:
    return Config(
        recipe="test",
        model=ModelConfig(
            arch=arch, size=SIZE, z_dim=8, g_width=8, d_width=8, max_width=16, d_norm=norm, blocks=1, group_width=4
        ),
        loss=LossConfig(loss, gamma=constant(gamma), penalty_every=every),
        augment=AugmentConfig(flip=False),
        optim=OptimConfig(g_lr=constant(1e-3), d_lr=constant(1e-3)),
        batch=BATCH,
        precision="fp32",
    )


def without_chance(family: str) -> Config:
    """A recipe without what each rank draws for itself, which no two world sizes could agree on."""
    c = tiny(family, SIZE, BATCH)
    return replace(c, model=replace(c.model, d_dropout=0.0), augment=AugmentConfig(flip=False))


def changed_loss(c: Config, **values: Any) -> Config:
    return replace(c, loss=replace(c.loss, **values))


def accumulated(c: Config) -> Config:
    return replace(c, accumulate=2, loss=replace(c.loss, share_batch=False))


def projected(c: Config) -> Config:
    """With a projected discriminator that the generator follows from the second step on."""
    return replace(c, projected=ProjectedConfig(weight=2.0, start_kimg=0.0))


CASES = {
    **{f"recipe {family}": without_chance(family) for family in FAMILIES},
    **{f"{name}, penalties": config(name, gamma=2.0) for name in LOSSES},
    "rpgan, lazy penalties": config("rpgan", gamma=2.0, every=2),
    "hinge, gradient penalty, drift": changed_loss(config("hinge"), gp=3.0, drift=0.1),
    "hinge, LeCam": changed_loss(config("hinge"), lecam=0.5),
    "rpgan, penalties, accumulated": accumulated(config("rpgan", gamma=2.0, arch="r3gan")),
    "rpgan, finite differences": changed_loss(config("rpgan", gamma=2.0, arch="r3gan"), penalty="finite-difference"),
    "hinge, finite differences, progan": changed_loss(
        config("hinge", gamma=2.0, arch="progan"), penalty="finite-difference"
    ),
    "bce, projected": projected(config("bce", norm="batch")),
    "bce, two layers frozen": replace(config("bce", norm="batch"), optim=OptimConfig(freeze_d=2)),
    "bce, compiled": replace(config("bce", norm="batch"), compile=True),
    "rpgan, finite differences, compiled": replace(
        changed_loss(config("rpgan", gamma=2.0, arch="r3gan"), penalty="finite-difference"), compile=True
    ),
    "stylegan2, path length in each step": changed_loss(without_chance("stylegan2"), path_every=1),
    "stylegan2, finite differences": changed_loss(without_chance("stylegan2"), penalty="finite-difference"),
}
# Traced by torch.compile, but run by PyTorch's own operations: compiling them takes half a minute.
TRACED = functools.partial(torch.compile, backend="aot_eager")


def steered(family: str) -> Config:
    """A recipe, with feedback from the critic where its loss allows it."""
    c = tiny(family, SIZE, BATCH)
    if not LOSSES[c.loss.name].has_level:
        return c
    a = replace(c.augment, policy=("colour", "translation", "cutout"), target=0.6, target_kimg=0.05)
    return replace(changed_loss(c, lecam=0.1), augment=a)


STEERED = {family: steered(family) for family in FAMILIES} | {"projected": projected(steered("dcgan-cpu"))}


def midpoint(reals: torch.Tensor, fakes: torch.Tensor) -> torch.Tensor:
    return reals.lerp(fakes, 0.5).detach().requires_grad_()


def perturbed(images: torch.Tensor) -> torch.Tensor:
    return images + 0.01 * images.flip(2)


def direction(images: torch.Tensor) -> torch.Tensor:
    return images.detach().flip(2) / SIZE


def fakes_of(gan: GAN, latents: Sequence[torch.Tensor], detach: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fakes for the parts of a batch from given latents, in turn."""
    remaining = iter(latents)

    def make(_: torch.Tensor) -> torch.Tensor:
        z = next(remaining)
        return gan.autocast(gan._maker, z).float().detach() if detach else gan._generate(z)

    return make


def two_steps(c: Config, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Gradients and weights after two iterations on fixed reals and latents, this rank's share of them."""
    torch.manual_seed(0)
    with mock.patch("torch.compile", TRACED):
        gan = GAN(c, torch.device("cpu"), world_size)
    if c.model.arch in ("r3gan", "biggan"):  # blocks or attention start with a zero, which would hide the rest of them
        for module in (gan.generator, gan.discriminator):
            for p in module.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, 0.0, 0.1)
    optimisers = [gan.g_optimiser, gan.d_optimiser] + ([gan.projected.optimiser] if gan.projected else [])
    for optimiser in optimisers:
        # The critic's level has no gradient under a relativistic loss; Adam's usual eps would blow up its rounding.
        optimiser.param_groups[0]["eps"] = 1e-3
    random = torch.Generator().manual_seed(1)
    kept: dict[str, torch.Tensor] = {}
    start, stop = share(BATCH, rank, world_size)
    # Each rank draws its own points between reals and fakes and near them, and its own path lengths; here all draw the
    # same.
    drawn = mock.patch.multiple("trainer.step", interpolate=midpoint, perturb=perturbed)
    directed = mock.patch("trainer.path_length.random_direction", direction)
    path_z = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(2))[start:stop]
    path_latents = mock.patch.object(GAN, "_latents", return_value=path_z)
    with drawn, directed, path_latents, mock.patch("trainer.projected._ALONE", BATCH):
        for step in range(2):
            gan.num_steps += 1
            gan.schedule(40 + 10 * step)  # a network that grows is in the middle of a fade
            reals = torch.randn(BATCH, 3, SIZE, SIZE, generator=random)[start:stop]
            reals = resize_to_level(reals, **gan.growth) if gan.growth else reals
            z = torch.randn(BATCH, 8, generator=random)[start:stop]
            parts, latents = reals.tensor_split(c.accumulate), z.tensor_split(c.accumulate)
            gan.discriminator_phase(parts, fakes_of(gan, latents, detach=True))
            grads = {f"d.{n}": p.grad for n, p in gan.discriminator.named_parameters()}
            gan.generator_phase(parts, fakes_of(gan, latents))
            grads |= {f"g.{n}": p.grad for n, p in gan.generator.named_parameters()}
            kept |= {f"grad{step}.{n}": g.clone() for n, g in grads.items() if g is not None}
    kept |= {f"g.{n}": t for n, t in gan.generator.state_dict().items()}
    kept |= {f"d.{n}": t for n, t in gan.discriminator.state_dict().items()}
    if gan.projected:
        kept |= {f"heads.{n}": t for n, t in gan.projected.heads.state_dict().items()}
    return kept | {"anchors": gan.anchors, **path_mean(gan)}


def path_mean(gan: GAN) -> dict[str, torch.Tensor]:
    return {"path length": gan.path_length.mean} if gan.path_length else {}


def whole_steps(c: Config, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Weights, and what steers them, after four calls of ``step`` itself, each rank drawing its own chance; in between
    rank 0 alone does what it does at a snapshot, which must not wait for the others."""
    torch.manual_seed(0)
    gan = GAN(c, torch.device("cpu"), world_size)
    if gan.projected:
        gan.projected.num_images = 1001  # the generator follows
        gan.projected.projection.scale.fill_(0.1)
    torch.manual_seed(rank + 1)
    start, stop = share(BATCH, rank, world_size)
    for step in range(4):
        reals = torch.randint(0, 256, (stop - start, 3, SIZE, SIZE), dtype=torch.uint8)
        gan.step(reals, 40 + 10 * step, reals.flip(3) if gan.fresh_reals else None)
        gan.ema.update(gan.generator, BATCH, 50 + 10 * step)
        if rank == 0:
            gan.recompute_ema_statistics()
            gan.sample(torch.randn(2, 8))
            gan.logits(reals)
            gan.fake_logits(torch.randn(2, 8))
    networks = {"g": gan.generator, "d": gan.discriminator}
    return {
        **{f"{n}.{key}": t for n, module in networks.items() for key, t in module.state_dict().items()},
        "anchors": gan.anchors,
        "p": torch.as_tensor(gan.p),
        **path_mean(gan),
    }


def _rank(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    # Two ranks add up in shared memory, four as those of several machines do.
    with mock.patch("trainer.distributed.shared_sums._open", return_value=None) if world_size == 4 else nullcontext():
        for name, c in CASES.items():
            torch.save(two_steps(c, rank, world_size), Path(folder) / f"{name}.{rank}.pt")
    if world_size == 2:
        for name, c in STEERED.items():
            torch.save(whole_steps(c, rank, world_size), Path(folder) / f"step {name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """What each of several ranks computed, by world size; four ranks hold unequal shares of six pictures."""

    @functools.cache
    def run(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        mp.spawn(_rank, (world_size, port, str(folder)), world_size)
        return folder

    return run


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_with_the_whole_batch(ranks, name: str, world_size: int):
    alone = two_steps(CASES[name], 0, 1)
    assert any(n.startswith("grad1.g.") for n in alone)
    for rank in range(world_size):
        together = torch.load(ranks(world_size) / f"{name}.{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            # The projected discriminator's network is deep, spectral normalisation and demodulation divide rounding by
            # a small norm, and finite differences by a small step.
            is_rounded = CASES[name].projected.weight > 0 or CASES[name].model.arch in ("fastgan", "stylegan2")
            atol = 3e-5 if "finite" in name else 1e-5 if is_rounded else 2e-6
            torch.testing.assert_close(together[key], value, rtol=2e-4, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("family", STEERED)
def test_ranks_stay_equal_through_whole_steps(ranks, family: str):
    a, b = (torch.load(ranks(2) / f"step {family}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, b[key]), key


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_each_phase_trains_its_own_network():
    torch.manual_seed(0)
    gan = GAN(config("rpgan", gamma=1.0), torch.device("cpu"))
    reals, fakes = torch.randn(BATCH, 3, SIZE, SIZE), gan._generate(torch.randn(BATCH, 8))
    g, d = weights(gan.generator), weights(gan.discriminator)
    gan.discriminator_phase([reals], lambda _: fakes.detach())
    assert changed(gan.discriminator, d)
    assert not changed(gan.generator, g)
    assert all(p.grad is None for p in gan.generator.parameters())
    d = weights(gan.discriminator)
    grads = [p.grad.clone() for p in gan.discriminator.parameters()]
    gan.generator_phase([reals], lambda _: fakes)
    assert changed(gan.generator, g)
    assert not changed(gan.discriminator, d)
    assert all(torch.equal(p.grad, q) for p, q in zip(gan.discriminator.parameters(), grads, strict=True))


def test_lazy_penalties_come_every_so_many_steps_and_that_much_stronger():
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    gan = GAN(config("rpgan", gamma=1.0, every=3), torch.device("cpu"))
    has_penalty = ["loss/r1r2" in gan.step(reals, 0) for _ in range(7)]
    assert has_penalty == [True, False, False, True, False, False, True]

    def gradient(gamma: float, every: int) -> torch.Tensor:
        torch.manual_seed(0)
        gan = GAN(config("rpgan", gamma=gamma, every=every), torch.device("cpu"))
        gan.num_steps = 1
        gan.discriminator_phase([reals.float() / 127.5 - 1], torch.zeros_like)
        return torch.cat([p.grad.flatten() for p in gan.discriminator.parameters()])

    torch.testing.assert_close(gradient(1.0, 3), gradient(3.0, 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_finite_differences_are_the_exact_penalty_on_average(precision: str):
    """Also with bf16, since the difference of two logits in bf16 would be rounding."""
    augmented = AugmentConfig(flip=False, policy=("colour", "translation", "cutout"), p=constant(0.5))
    exact = replace(config("rpgan", gamma=1e-6), augment=augmented, precision=precision)
    torch.manual_seed(0)
    gan = GAN(exact, torch.device("cpu"))
    reals, fakes = torch.randn(2, 500, 3, SIZE, SIZE)
    gan.scale = 1 / 500
    found = {}
    for penalty in ("exact", "finite-difference"):
        gan.config = changed_loss(exact, penalty=penalty)
        gan.schedule(0)
        stats: dict[str, torch.Tensor] = {}
        torch.manual_seed(1)
        gan._discriminator_loss(reals, fakes, stats)
        found[penalty] = stats["loss/r1r2"].item()
    # The standard error of 1,000 estimates is 4.5%, the same of both penalties that of their augmentations.
    assert found["finite-difference"] == pytest.approx(found["exact"], rel=0.15)


def steps_of(c: Config) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    gan = GAN(c, torch.device("cpu"))
    for step in range(3):
        reals = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1
        stats = gan.step(reals, step * BATCH, reals.flip(3) if gan.fresh_reals else None)
        gan.sample(torch.randn(2, 8), raw=True)
    return stats | {n: p.detach() for n, p in gan.discriminator.named_parameters()}


@pytest.mark.parametrize(
    "c",
    [
        config("bce", norm="batch"),
        changed_loss(config("rpgan", gamma=2.0, every=2), penalty="finite-difference", share_batch=False),
    ],
)
def test_compiled_networks_train_alike(c: Config):
    with mock.patch("torch.compile", functools.partial(TRACED, fullgraph=True)):
        compiled = steps_of(replace(c, compile=True))
    torch.testing.assert_close(compiled, steps_of(c))


def test_hyperparameters_follow_their_schedules():
    c = config()
    c = replace(c, optim=replace(c.optim, g_lr=replace(c.optim.g_lr, start=1.0, end=0.0, kimg=2.0)))
    gan = GAN(c, torch.device("cpu"))
    gan.schedule(1000)
    assert gan.g_optimiser.param_groups[0]["lr"] == pytest.approx(0.5)
    assert gan.d_optimiser.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_reals_are_scaled_to_minus_one_to_one():
    gan = GAN(config(), torch.device("cpu"))
    prepared = gan._prepare(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, SIZE, SIZE))
    assert prepared[0].unique().item() == -1
    assert prepared[1].unique().item() == 1


def test_the_first_layers_keep_their_weights():
    layers = torch.nn.Sequential(Conv2d(3, 4, 3), BatchNorm2d(4), Conv2d(4, 5, 3), Linear(2, 2))
    freeze_first(layers, 2)
    assert [p.requires_grad for p in layers.parameters()] == [False] * 6 + [True] * 2
    with frozen(layers):
        assert not any(p.requires_grad for p in layers.parameters())
    assert [p.requires_grad for p in layers.parameters()] == [False] * 6 + [True] * 2
    with pytest.raises(ValueError, match="3 layers, of which at most 2"):
        freeze_first(layers, 3)


def test_the_weight_and_the_bias_of_a_normalised_layer_stay_together():
    layers = torch.nn.Sequential(*(spectral_norm(Conv2d(3, 3, 1)) for _ in range(2)))
    freeze_first(layers, 0)
    assert all(p.requires_grad for p in layers.parameters())
    freeze_first(layers, 1)
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())


@pytest.mark.parametrize("arch", ["dcgan", "r3gan", "stylegan2", "fastgan"])
def test_frozen_layers_are_those_next_to_the_image(arch: str):
    c = changed_loss(config("bce", arch=arch), reconstruction=float(arch == "fastgan"))
    gan = GAN(replace(c, optim=replace(c.optim, freeze_d=2)), torch.device("cpu"))
    before = {name: value.clone() for name, value in gan.discriminator.named_parameters()}
    for nimg in (0, BATCH):
        gan.step(torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1, nimg)
    kept = [name for name, value in gan.discriminator.named_parameters() if torch.equal(value, before[name])]
    assert kept == [name for name, value in gan.discriminator.named_parameters() if not value.requires_grad]
    assert f"rgb{SIZE}" in kept[0]
    assert len(kept) < len(before)


def test_frozen_lets_gradients_through_to_the_input():
    layer = torch.nn.Linear(2, 1)
    x = torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        layer(x).backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.weight.requires_grad


def test_separate_batches_for_the_phases():
    c = config("rpgan", gamma=1.0)
    gan = GAN(replace(c, loss=replace(c.loss, share_batch=False)), torch.device("cpu"))
    reals = torch.randn(BATCH, 3, SIZE, SIZE)
    stats = gan.step(reals, 0, torch.randn_like(reals))
    assert {"loss/discriminator", "loss/generator", "loss/r1r2", "d/real", "d/fake", "d/sign"} == set(stats)
    assert all(torch.isfinite(v) for v in stats.values())


@pytest.mark.parametrize("arch", ["r3gan", "progan"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(arch: str):
    """Without batch norm and minibatch statistics, which are those of a part."""

    def gradients(accumulate: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        c = changed_loss(config("hinge", gamma=2.0, arch=arch), share_batch=False, lecam=0.1)
        gan = GAN(replace(c, accumulate=accumulate), torch.device("cpu"))
        for module in (gan.generator, gan.discriminator):
            for p in module.parameters():
                torch.nn.init.normal_(p, 0.0, 0.1)
        reals, z = torch.randn(BATCH, 3, SIZE, SIZE), torch.randn(BATCH, 8)
        gan.num_steps = 1
        gan.schedule(10**9)
        with mock.patch("trainer.models.progan.minibatch_stddev", lambda x, over_ranks: x.new_zeros(())):
            parts, latents = reals.tensor_split(accumulate), z.tensor_split(accumulate)
            gan.discriminator_phase(parts, fakes_of(gan, latents, detach=True))
            kept = [p.grad.clone() for p in gan.discriminator.parameters() if p.grad is not None]
            gan.generator_phase(parts, fakes_of(gan, latents))
        return kept + [p.grad.clone() for p in gan.generator.parameters() if p.grad is not None]

    for whole, parts in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_generator_waits_for_the_critic():
    gan = GAN(changed_loss(config("wasserstein"), n_critic=3), torch.device("cpu"))
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    trained = []
    for _ in range(6):
        before = weights(gan.generator)
        stats = gan.step(reals, 0)
        trained.append(changed(gan.generator, before))
        assert trained[-1] == ("loss/generator" in stats)
    assert trained == [False, False, True, False, False, True]


def test_clipped_weights_stay_within_bounds():
    gan = GAN(changed_loss(config("wasserstein"), clip=0.01), torch.device("cpu"))
    gan.step(torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8), 0)
    assert max(p.abs().max().item() for p in gan.discriminator.parameters()) == pytest.approx(0.01)
    assert max(p.abs().max().item() for p in gan.generator.parameters()) > 0.01


def test_clipping_leaves_frozen_layers_as_they_are():
    c = changed_loss(config("wasserstein"), clip=0.01)
    gan = GAN(replace(c, optim=replace(c.optim, freeze_d=2)), torch.device("cpu"))
    before = copy.deepcopy(gan.discriminator.state_dict())
    gan.step(torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8), 0)
    kept = [name for name, p in gan.discriminator.named_parameters() if not p.requires_grad]
    assert kept
    assert all(torch.equal(gan.discriminator.state_dict()[name], before[name]) for name in kept)
    trained = [p.abs().max().item() for p in gan.discriminator.parameters() if p.requires_grad]
    assert max(trained) == pytest.approx(0.01)


def test_smoothed_labels_are_cross_entropy_with_soft_targets():
    gan = GAN(changed_loss(config("bce"), smoothing=0.1), torch.device("cpu"))
    reals, fakes = torch.randn(BATCH, 3, SIZE, SIZE), torch.randn(BATCH, 3, SIZE, SIZE)
    real, fake = gan.discriminator(reals, fakes)
    expected = binary_cross_entropy_with_logits(
        torch.cat([real, fake]), torch.cat([torch.full_like(real, 0.9), torch.zeros_like(fake)]), reduction="sum"
    )
    loss = gan._discriminator_loss(reals, fakes, {})
    torch.testing.assert_close(loss, expected / BATCH)


def test_instance_noise_has_its_standard_deviation_and_ends():
    c = config()
    noisy = replace(c, augment=AugmentConfig(flip=False, noise=Schedule(0.3, 0.0, 1)))
    gan = GAN(noisy, torch.device("cpu"))
    images = torch.zeros(64, 3, SIZE, SIZE)
    assert gan._view(images).std().item() == pytest.approx(0.3, rel=0.05)
    gan.schedule(1000)
    assert not gan._view(images).any()


def test_adaptive_augmentation_follows_the_sign_of_the_critic_on_reals():
    a = AugmentConfig(flip=False, policy=("cutout",), target=0.6, target_kimg=0.1)
    gan = GAN(replace(config(), augment=a), torch.device("cpu"))
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        gan.discriminator.layers.critic.bias.fill_(100.0)  # sure of everything
    for _ in range(8):
        gan.step(reals, 0)
    assert float(gan.p) == pytest.approx(8 * BATCH / 100)
    with torch.no_grad():
        gan.discriminator.layers.critic.bias.fill_(-100.0)
    for _ in range(4):
        gan.step(reals, 0)
    assert float(gan.p) == pytest.approx(4 * BATCH / 100)


def test_lecam_anchors_start_at_the_first_batch_and_then_move_slowly():
    gan = GAN(changed_loss(config("hinge"), lecam=0.3), torch.device("cpu"))
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    first = gan.step(reals, 0)
    torch.testing.assert_close(gan.anchors, torch.stack([first["d/real"], first["d/fake"]]))
    gan.anchor_steps = 1000
    second = gan.step(reals, 0)
    torch.testing.assert_close(gan.anchors[0], 0.99 * first["d/real"] + 0.01 * second["d/real"])


@pytest.mark.parametrize("counted", [True, False])
def test_lecam_switched_on_by_a_resume_starts_at_the_first_batch(counted: bool):
    c = config("hinge")
    without = GAN(c, torch.device("cpu"))
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    for _ in range(3):
        without.step(reals, 0)
    state = without.state_dict()
    if not counted:  # a checkpoint from before the count was kept
        del state["anchor_steps"]
    gan = GAN(changed_loss(c, lecam=0.3), torch.device("cpu"))
    gan.load_state_dict(state)
    first = gan.step(reals, 0)
    torch.testing.assert_close(gan.anchors, torch.stack([first["d/real"], first["d/fake"]]))
    resumed = GAN(gan.config, torch.device("cpu"))
    resumed.load_state_dict(gan.state_dict())
    second = resumed.step(reals, 0)
    torch.testing.assert_close(resumed.anchors[0], (first["d/real"] + second["d/real"]) / 2)


def test_networks_that_grow_train_the_layers_of_their_level_only():
    gan = GAN(replace(config(arch="progan"), grow=GrowConfig(4, 1, 1)), torch.device("cpu"))
    gan.step(torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8), 1500)  # halfway from 4 to 8
    moved = {n for n, p in gan.generator.named_parameters() if p.grad is not None}
    assert {"to_rgb.4.weight", "to_rgb.8.weight", "up.8.conv1.weight"} <= moved
    assert not any(".16." in name for name in moved)
    assert gan.sample(torch.randn(2, 8)).shape == (2, 3, SIZE, SIZE)


def test_what_is_judged_of_fakes_is_what_training_shows_of_them():
    gan = GAN(replace(config(arch="progan"), grow=GrowConfig(4, 1, 1)), torch.device("cpu"))
    gan.schedule(1500)  # in a fade, where pictures enlarged and shrunk again would be blended twice
    z = torch.randn(4, 8)
    fakes = gan.generator(z, **gan.growth)
    gan.discriminator.eval()
    (expected,) = gan.discriminator(fakes, **gan.growth)
    torch.testing.assert_close(gan.fake_logits(z), expected.detach())


def test_judging_changes_nothing():
    gan = GAN(config(norm="batch"), torch.device("cpu"))
    before = {n: t.clone() for n, t in gan.discriminator.state_dict().items()}
    assert gan.logits(torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)).shape == (3,)
    assert all(torch.equal(t, before[n]) for n, t in gan.discriminator.state_dict().items())
    assert gan.discriminator.training
