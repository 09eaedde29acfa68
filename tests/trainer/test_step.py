"""The step: two ranks are one process with the whole batch; phases touch only their own network."""

import functools
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.config import AugmentConfig, Config, LossConfig, ModelConfig, OptimConfig, constant
from trainer.data.stream import share
from trainer.losses import LOSSES
from trainer.step import GAN, frozen

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


CASES = {
    **{f"{name}": config(name) for name in LOSSES},
    **{f"{name}, penalties": config(name, gamma=2.0) for name in LOSSES},
    "rpgan, lazy penalties": config("rpgan", gamma=2.0, every=2),
    "bce, batch norm in D": config("bce", norm="batch"),
    "r3gan networks": config("rpgan", gamma=2.0, arch="r3gan"),
}


def two_steps(c: Config, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Gradients and weights after two iterations on fixed reals and latents, this rank's share of them."""
    torch.manual_seed(0)
    gan = GAN(c, torch.device("cpu"), world_size)
    if c.model.arch == "r3gan":  # its blocks start with a zero layer, which would hide the rest of them
        for module in (gan.generator, gan.discriminator):
            for p in module.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, 0.0, 0.1)
    for optimiser in (gan.g_optimiser, gan.d_optimiser):
        # The critic's level has no gradient under a relativistic loss; Adam's usual eps would blow up its rounding.
        optimiser.param_groups[0]["eps"] = 1e-3
    random = torch.Generator().manual_seed(1)
    kept: dict[str, torch.Tensor] = {}
    start, stop = share(BATCH, rank, world_size)
    for step in range(2):
        reals = torch.randn(BATCH, 3, SIZE, SIZE, generator=random)[start:stop]
        z = torch.randn(BATCH, 8, generator=random)[start:stop]
        fakes = gan._generate(z)
        gan.discriminator_phase(reals, fakes.detach(), 0)
        grads = {f"d.{n}": p.grad for n, p in gan.discriminator.named_parameters()}
        gan.generator_phase(reals, fakes, 0)
        grads |= {f"g.{n}": p.grad for n, p in gan.generator.named_parameters()}
        gan.num_steps += 1
        kept |= {f"grad{step}.{n}": g.clone() for n, g in grads.items() if g is not None}
    kept |= {f"g.{n}": t for n, t in gan.generator.state_dict().items()}
    kept |= {f"d.{n}": t for n, t in gan.discriminator.state_dict().items()}
    return kept


def _rank(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for name, c in CASES.items():
        torch.save(two_steps(c, rank, world_size), Path(folder) / f"{name}.{rank}.pt")
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


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_with_the_whole_batch(ranks, name: str, world_size: int):
    alone = two_steps(CASES[name], 0, 1)
    assert any(n.startswith("grad1.g.") for n in alone)
    for rank in range(world_size):
        together = torch.load(ranks(world_size) / f"{name}.{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=2e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_each_phase_trains_its_own_network():
    torch.manual_seed(0)
    gan = GAN(config("rpgan", gamma=1.0), torch.device("cpu"))
    reals, fakes = torch.randn(BATCH, 3, SIZE, SIZE), gan._generate(torch.randn(BATCH, 8))
    g, d = weights(gan.generator), weights(gan.discriminator)
    gan.discriminator_phase(reals, fakes.detach(), 0)
    assert changed(gan.discriminator, d)
    assert not changed(gan.generator, g)
    assert all(p.grad is None for p in gan.generator.parameters())
    d = weights(gan.discriminator)
    grads = [p.grad.clone() for p in gan.discriminator.parameters()]
    gan.generator_phase(reals, fakes, 0)
    assert changed(gan.generator, g)
    assert not changed(gan.discriminator, d)
    assert all(torch.equal(p.grad, q) for p, q in zip(gan.discriminator.parameters(), grads, strict=True))


def test_lazy_penalties_come_every_so_many_steps_and_that_much_stronger():
    reals = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    gan = GAN(config("rpgan", gamma=1.0, every=3), torch.device("cpu"))
    has_penalty = ["loss/penalty" in gan.step(reals, 0) for _ in range(7)]
    assert has_penalty == [True, False, False, True, False, False, True]

    def gradient(gamma: float, every: int) -> torch.Tensor:
        torch.manual_seed(0)
        gan = GAN(config("rpgan", gamma=gamma, every=every), torch.device("cpu"))
        gan.discriminator_phase(reals.float() / 127.5 - 1, torch.zeros(BATCH, 3, SIZE, SIZE), 0)
        return torch.cat([p.grad.flatten() for p in gan.discriminator.parameters()])

    torch.testing.assert_close(gradient(1.0, 3), gradient(3.0, 1))


def test_hyperparameters_follow_their_schedules():
    c = config()
    c = replace(c, optim=replace(c.optim, g_lr=replace(c.optim.g_lr, start=1.0, end=0.0, kimg=2.0)))
    gan = GAN(c, torch.device("cpu"))
    gan._set_hyperparameters(1000)
    assert gan.g_optimiser.param_groups[0]["lr"] == pytest.approx(0.5)
    assert gan.d_optimiser.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_reals_are_scaled_to_minus_one_to_one():
    gan = GAN(config(), torch.device("cpu"))
    prepared = gan._prepare(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, SIZE, SIZE))
    assert prepared[0].unique().item() == -1
    assert prepared[1].unique().item() == 1


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
    assert {"loss/discriminator", "loss/generator", "loss/penalty", "d/real", "d/fake"} == set(stats)
    assert all(torch.isfinite(v) for v in stats.values())
