"""What a CPU can check of a training on a GPU.

Tensors on the device "meta" have shapes and types but no values: a whole step runs there, second derivatives included,
and it fails if two devices are mixed or if a value is read, which on a GPU means waiting for it. Fake tensors on
"cuda:0" also tell one GPU from another and run the fused optimiser, but not backward (pytorch#92627).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.augment import augment, random_flip
from trainer.config import AugmentConfig, Config, ProjectedConfig, constant
from trainer.data.stream import share
from trainer.distributed.collectives import batch_mean, mean_over_ranks, sum_over_ranks
from trainer.losses import LOSSES
from trainer.models import build_discriminator, build_generator
from trainer.networks import set_up_device
from trainer.recipes import FAMILIES, resolve
from trainer.step import GAN

META, CUDA = torch.device("meta"), torch.device("cuda:0")
BATCH = 4


class GeneratorsMatchDevices(TorchFunctionMode):
    """Refuses a random generator of another device than the tensor's, as a GPU does and meta does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, torch.Generator) and isinstance(result, torch.Tensor):
            assert generator.device.type == result.device.type, f"{func.__name__}: {generator.device}, {result.device}"
        return result


@contextmanager
def on_meta() -> Iterator[None]:
    """Autocast and the fused optimiser do not know the device meta."""
    adam = torch.optim.Adam
    with (
        mock.patch("torch.autocast", return_value=nullcontext()),
        mock.patch("torch.optim.Adam", lambda parameters, fused, **values: adam(parameters, foreach=True, **values)),
        GeneratorsMatchDevices(),
    ):
        yield


def train_on_meta(config: Config) -> dict[str, torch.Tensor]:
    """Some steps, and what happens at a snapshot."""
    gan = GAN(config, META)
    if gan.projected:
        gan.projected.num_images = 1001  # the generator follows
    stats: dict[str, torch.Tensor] = {}
    for step in range(max(config.loss.n_critic, 5 if config.augment.target else 2)):
        reals = torch.empty(BATCH, 3, config.model.size, config.model.size, dtype=torch.uint8, device=META)
        nimg = 10_000_000 + BATCH * step  # progressive networks are grown
        stats |= gan.step(reals, nimg, reals.clone() if gan.fresh_reals else None)
        gan.ema.update(gan.generator, BATCH, nimg + BATCH)
    gan.recompute_ema_statistics()
    z = torch.empty(2, config.model.z_dim, device=META)
    assert gan.sample(z).device == gan.sample(z, raw=True).device == META
    assert gan.logits(reals).device == gan.fake_logits(z).device == META
    return stats


def recipe(family: str) -> Config:
    """A GPU's recipe with everything that its loss allows."""
    c = resolve(f"{family}-32", None, gpu=True)
    steered = LOSSES[c.loss.name].has_level
    return replace(
        c,
        batch=BATCH,
        augment=AugmentConfig(
            policy=("colour", "translation", "cutout"), p=constant(0.5), target=0.6 * steered, noise=constant(0.1)
        ),
        loss=replace(c.loss, lecam=0.1 * steered),
    )


def finite(c: Config) -> Config:
    return replace(c, loss=replace(c.loss, penalty="finite-difference"))


CASES = {family: recipe(family) for family in FAMILIES} | {
    "r3gan, finite differences": finite(recipe("r3gan")),
    "projected": replace(recipe("dcgan-cpu"), projected=ProjectedConfig(weight=3.0)),
    "accumulated": replace(recipe("r3gan"), accumulate=2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_mixes_no_devices_and_waits_for_none(name: str):
    with on_meta():
        stats = train_on_meta(CASES[name])
    assert all(value.device == META for value in stats.values())
    assert {"loss/discriminator", "loss/generator"} <= stats.keys()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda gan, reals: torch.randn(len(reals), 100), "device"),
        (lambda gan, reals: torch.randn(len(reals), 100, device=META) * gan.anchors.sum().item(), "item"),
        (
            lambda gan, reals: torch.randn(len(reals), 100, device=META, generator=torch.Generator()),
            "randn: cpu, meta",
        ),
    ],
)
def test_the_rehearsal_finds_what_would_fail_on_a_gpu(fault: Any, message: str):
    with (
        on_meta(),
        mock.patch.object(GAN, "_latents", fault),
        pytest.raises((RuntimeError, AssertionError), match=message),
    ):
        train_on_meta(recipe("dcgan"))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_and_the_fused_optimiser_on_a_fake_gpu(family: str):
    c = recipe(family)
    with FakeTensorMode(), CUDA:
        generator, discriminator = build_generator(c.model), build_discriminator(c.model)
        reals = random_flip(torch.rand(BATCH, 3, 32, 32))
        fakes = augment(generator(torch.randn(BATCH, c.model.z_dim)), c.augment.policy, torch.tensor(0.5))
        logits = discriminator(reals, fakes)
        optimiser = torch.optim.Adam(generator.parameters(), fused=True)
        for p in generator.parameters():
            p.grad = torch.zeros_like(p)
        optimiser.step()
    assert [x.device for x in logits] == [CUDA, CUDA]


def test_in_bf16_layers_compute_in_bf16_and_weights_logits_and_losses_stay_in_fp32():
    """With the CPU's autocast: that of CUDA is off where there is no GPU, without a word."""
    for c in (recipe("dcgan"), recipe("r3gan"), finite(recipe("r3gan"))):
        gan = GAN(replace(c, precision="bf16", model=replace(c.model, g_width=8, d_width=8)), torch.device("cpu"))
        seen: dict[str, set[torch.dtype]] = {"generator": set(), "discriminator": set()}
        for name, types in seen.items():
            for layer in getattr(gan, name).modules():
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                    layer.register_forward_hook(lambda _, __, output, types=types: types.add(output.dtype))
        reals = torch.rand(BATCH, 3, 32, 32)
        stats = gan.step(reals, 0, reals)
        assert seen["generator"] == {torch.bfloat16}
        # The step's finite differences run in fp32, the generator's phase does not.
        wanted = {torch.bfloat16, torch.float32} if c.loss.penalty == "finite-difference" else {torch.bfloat16}
        assert seen["discriminator"] == wanted
        assert {value.dtype for value in stats.values()} == {torch.float32}
        parameters = [*gan.generator.parameters(), *gan.discriminator.parameters()]
        assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters if p.grad is not None}


def test_collectives_of_sixty_four_gpus():
    shares = [share(256, rank, 64) for rank in range(64)]
    assert shares[0] == (0, 4)
    assert shares[63] == (252, 256)
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        with (
            warnings.catch_warnings(),
            FakeTensorMode(),
            mock.patch("torch.distributed.get_backend", return_value="nccl"),
        ):
            warnings.simplefilter("ignore")
            x = torch.ones(5, device=CUDA)
            for result in (sum_over_ranks(x), mean_over_ranks(x), batch_mean(x)):
                assert result.device == CUDA
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("precision", "tf32"),
    [("auto", True), ("bf16", True), ("fp32", False)],
)
def test_gpus_try_algorithms_and_use_tf32_unless_fp32_is_asked_for(precision: Any, tf32: bool):
    backends = mock.MagicMock()
    with mock.patch("torch.backends", backends):
        set_up_device(replace(recipe("r3gan"), precision=precision), CUDA)
    assert backends.cudnn.benchmark is True
    assert backends.cudnn.allow_tf32 is backends.cuda.matmul.allow_tf32 is tf32
