"""One iteration of GAN training: a discriminator phase, then a generator phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.augment import augment, random_flip
from trainer.config import Config
from trainer.ema import EMA
from trainer.losses import LOSSES, zero_centred_penalty
from trainer.models import Discriminator, Generator, build_discriminator, build_generator


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware (AVX512-BF16 or AMX on CPUs), so that autocast pays off."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for ``module``'s parameters inside; gradients still flow through it to its input."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class GAN:
    """The networks, their optimisers and the average of the generator's weights; ``step`` trains them.

    ``generator`` and ``discriminator`` are always the bare modules: state dicts come from them. With several ranks
    each has a DistributedDataParallel wrapper of its own, used only in the phase that trains it (one joint wrapper
    would see unused parameters: pytorch-lightning#20328). Buffers are not broadcast: batch norm's statistics are
    equal on all ranks anyway (``models.common.BatchNorm``), and a broadcast between two forwards of one backward
    breaks autograd (pytorch#22095).
    """

    def __init__(self, config: Config, device: torch.device, world_size: int = 1) -> None:
        self.config, self.device = config, device
        self.loss = LOSSES[config.loss.name]
        self.generator: Generator = _place(build_generator(config.model), device)
        self.discriminator: Discriminator = _place(build_discriminator(config.model), device)
        self.ema = EMA(self.generator, config.ema.half_life_kimg * 1000, config.ema.ramp)
        self.g_optimiser = _adam(self.generator, config)
        self.d_optimiser = _adam(self.discriminator, config)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16(device))
        # Ranks may hold shares of the batch that differ by one picture; DDP averages over ranks, so a rank's sum
        # times this gives the mean over the global batch.
        self.scale = world_size / config.batch
        self.num_steps = 0
        self._g: nn.Module = self.generator
        self._d: nn.Module = self.discriminator
        if world_size > 1:
            self._g = DistributedDataParallel(self.generator, forward_sync_buffers=False)
            self._d = DistributedDataParallel(self.discriminator, forward_sync_buffers=False)

    def step(self, reals: Tensor, nimg: int, more_reals: Tensor | None = None) -> dict[str, Tensor]:
        """Train both networks on one batch.

        Args:
            reals: this rank's part of the batch, uint8 or float in [-1, 1] ``[n, 3, size, size]``.
            nimg: images seen by all ranks before this step.
            more_reals: fresh reals for the generator's phase; None: the same ones.

        Returns:
            Detached scalars on the device, nothing here waits for it. Their mean over ranks is that over the batch.
        """
        c = self.config
        self._set_hyperparameters(nimg)
        reals = self._prepare(reals)
        z = torch.randn(len(reals), c.model.z_dim, device=self.device)
        if c.loss.share_batch:
            fakes = self._generate(z)
            stats = self.discriminator_phase(reals, fakes.detach(), nimg)
        else:
            with torch.no_grad():
                fakes = self._autocast(self.generator, z)
            stats = self.discriminator_phase(reals, fakes, nimg)
            reals = self._prepare(more_reals) if more_reals is not None else reals
            fakes = self._generate(torch.randn_like(z))
        stats |= self.generator_phase(reals, fakes, nimg)
        self.num_steps += 1
        return stats

    def discriminator_phase(self, reals: Tensor, fakes: Tensor, nimg: int) -> dict[str, Tensor]:
        """Tell reals from fakes; every ``penalty_every`` steps also flatten the critic around both (R1 and R2)."""
        c = self.config
        gamma = c.loss.gamma(nimg) * c.loss.penalty_every
        penalise = gamma > 0 and self.num_steps % c.loss.penalty_every == 0
        reals = reals.detach().requires_grad_(penalise)
        fakes = fakes.detach().requires_grad_(penalise)
        real, fake = self._autocast(self._d, self._augment(reals, nimg), self._augment(fakes, nimg))
        adversarial = self.loss.discriminator(real, fake).sum() * self.scale
        loss = adversarial
        stats = {
            "loss/discriminator": adversarial.detach(),
            "d/real": real.detach().sum() * self.scale,
            "d/fake": fake.detach().sum() * self.scale,
        }
        if penalise:
            penalty = zero_centred_penalty([reals, fakes], torch.cat([real, fake])).sum() * self.scale
            loss = loss + gamma / 2 * penalty
            stats["loss/penalty"] = penalty.detach()
        self.d_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.d_optimiser.step()
        return stats

    def generator_phase(self, reals: Tensor, fakes: Tensor, nimg: int) -> dict[str, Tensor]:
        """Make the fakes look real to the discriminator; ``fakes`` carries the generator's graph."""
        with frozen(self.discriminator):
            if self.loss.paired:
                real, fake = self._autocast(self.discriminator, self._augment(reals, nimg), self._augment(fakes, nimg))
            else:
                (fake,) = self._autocast(self.discriminator, self._augment(fakes, nimg))
                real = fake.new_empty(0)
            loss = self.loss.generator(real, fake).sum() * self.scale
            self.g_optimiser.zero_grad(set_to_none=True)
            loss.backward()
        self.g_optimiser.step()
        return {"loss/generator": loss.detach()}

    def _generate(self, z: Tensor) -> Tensor:
        return self._autocast(self._g, z).float()

    def _autocast(self, module: nn.Module, *inputs: Tensor):  # type: ignore[no-untyped-def]  # as the module returns
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return module(*inputs)

    def _prepare(self, reals: Tensor) -> Tensor:
        """Pictures on the device, float in [-1, 1], mirrored at random."""
        reals = reals.to(self.device, non_blocking=True)
        if reals.dtype == torch.uint8:
            reals = reals.float() / 127.5 - 1
        reals = random_flip(reals) if self.config.augment.flip else reals
        return reals.contiguous(memory_format=torch.channels_last)

    def _augment(self, images: Tensor, nimg: int) -> Tensor:
        return augment(images, self.config.augment.policy, self.config.augment.p(nimg))

    def _set_hyperparameters(self, nimg: int) -> None:
        o = self.config.optim
        for optimiser, lr in ((self.g_optimiser, o.g_lr), (self.d_optimiser, o.d_lr)):
            for group in optimiser.param_groups:
                group["lr"] = lr(nimg)
                group["betas"] = (o.beta1, o.beta2(nimg))


M = TypeVar("M", bound=nn.Module)


def _place(module: M, device: torch.device) -> M:
    """On the device, in the memory layout that convolutions are fastest in."""
    module.to(device)
    module.to(memory_format=torch.channels_last)
    return module


def _adam(module: nn.Module, config: Config) -> torch.optim.Adam:
    o = config.optim
    return torch.optim.Adam(module.parameters(), lr=o.g_lr.start, betas=(o.beta1, o.beta2.start), eps=1e-8, fused=True)
