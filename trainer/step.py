"""One iteration of GAN training: a discriminator phase, then a generator phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.augment import AdaptiveProbability, augment, random_flip
from trainer.config import Config
from trainer.distributed.collectives import batch_mean, mean_over_ranks
from trainer.distributed.shared_sums import shared_sums
from trainer.ema import EMA
from trainer.losses import LOSSES, interpolate, lecam, one_centred_penalty, zero_centred_penalty
from trainer.models import AtLevel, Discriminator, Generator, build_discriminator, build_generator, resize_to_level

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Reals and fakes ``[n, 3, h, w]`` of each part of a batch, fakes made when their turn comes."""


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
    equal on all ranks anyway (``models.batchnorm.BatchNorm``), and a broadcast between two forwards of one backward
    breaks autograd (pytorch#22095). Networks that grow do have layers that are not in use yet, which only their
    wrappers look for.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int = 1) -> None:
        self.config, self.device = config, device
        self.loss = LOSSES[config.loss.name]
        # Whether a step wants other reals for the generator's phase: only relativistic losses look at any there.
        self.fresh_reals = self.loss.relativistic and not config.loss.share_batch
        self.generator: Generator = _place(build_generator(config.model), device)
        self.discriminator: Discriminator = _place(build_discriminator(config.model), device)
        self.ema = EMA(self.generator, config.ema.half_life_kimg * 1000, config.ema.ramp)
        self.g_optimiser = _optimiser(self.generator, config)
        self.d_optimiser = _optimiser(self.discriminator, config)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and native_bf16(device))
        # Ranks may hold shares of the batch that differ by one picture; DDP averages over ranks, so a rank's sum
        # times this gives the mean over the global batch.
        self.scale = world_size / config.batch
        self.num_steps = 0
        self.lr_scale = 1.0
        """Factor of the learning rates; lower after a rollback."""
        a = config.augment
        self.adaptive = AdaptiveProbability(a.p.start, a.target, a.target_kimg, device) if a.target else None
        self.anchors = torch.zeros(2, device=device)  # LeCam's running means of the critic on reals and fakes
        self._g: nn.Module = self.generator
        self._d: nn.Module = self.discriminator
        if world_size > 1:
            self._g, self._d = wrappers = [
                DistributedDataParallel(
                    m,
                    forward_sync_buffers=False,
                    find_unused_parameters=self.generator.grows,
                    gradient_as_bucket_view=True,
                )
                for m in (self.generator, self.discriminator)
            ]
            if device.type == "cpu" and (sums := shared_sums()):
                for wrapper in wrappers:
                    wrapper.register_comm_hook(None, lambda _, bucket: sums.average(bucket))
        self.schedule(0)

    def schedule(self, nimg: int) -> None:
        """Set everything that follows from the position: learning rates, penalty, augmentation, level of growth."""
        c, o = self.config, self.config.optim
        beta2 = o.beta2(nimg)
        decay = {"betas": (o.beta1, beta2)} if o.name == "adam" else {"alpha": beta2}
        for optimiser, lr in ((self.g_optimiser, o.g_lr), (self.d_optimiser, o.d_lr)):
            for group in optimiser.param_groups:
                group.update(lr=lr(nimg) * self.lr_scale, **decay)
        self.gamma = c.loss.gamma(nimg)
        self.p: float | Tensor = self.adaptive.p if self.adaptive else c.augment.p(nimg)
        self.noise = c.augment.noise(nimg)
        self.growth = {"level": c.grow.level(nimg, c.model.size)} if self.generator.grows else {}

    def step(self, reals: Tensor, nimg: int, more_reals: Tensor | None = None) -> dict[str, Tensor]:
        """Train the discriminator on one batch, and the generator too in every ``n_critic``-th call.

        Args:
            reals: this rank's part of the batch, uint8 or float in [-1, 1] ``[n, 3, size, size]``.
            nimg: images seen by all ranks before this step.
            more_reals: other reals for the generator's phase, wanted if ``fresh_reals``; None: the same ones.

        Returns:
            Detached scalars on the device, nothing here waits for it. Their mean over ranks is that over the batch.
        """
        c = self.config.loss
        self.schedule(nimg)
        self.num_steps += 1
        train_generator = self.num_steps % c.n_critic == 0
        reals = self._prepare(reals)
        if c.share_batch and train_generator:
            fakes = self._generate(self._latents(reals))
            stats = self.discriminator_phase([(reals, fakes.detach())])
            return stats | self.generator_phase([(reals, fakes)])
        stats = self.discriminator_phase((part, self._fakes(part)) for part in self._parts(reals))
        if train_generator:
            reals = self._prepare(more_reals) if more_reals is not None else reals
            stats |= self.generator_phase((part, self._generate(self._latents(part))) for part in self._parts(reals))
        return stats

    def discriminator_phase(self, pairs: Pairs) -> dict[str, Tensor]:
        """Tell reals from fakes."""
        stats: dict[str, Tensor] = {}
        self.d_optimiser.zero_grad(set_to_none=True)
        for reals, fakes in self._accumulate(self._d, pairs):
            self._discriminator_loss(reals, fakes, stats).backward()
        self.d_optimiser.step()
        if clip := self.config.loss.clip:
            with torch.no_grad():
                torch._foreach_clamp_min_(list(self.discriminator.parameters()), -clip)
                torch._foreach_clamp_max_(list(self.discriminator.parameters()), clip)
        self._feed_back(stats)
        return stats

    def _discriminator_loss(self, reals: Tensor, fakes: Tensor, stats: dict[str, Tensor]) -> Tensor:
        """The loss of one part of a batch, penalties included; adds to ``stats``.

        R1 and R2 come every ``penalty_every`` steps and flatten the critic around reals and fakes, with respect to
        the pictures before augmentation (Huang et al. 2024). All pictures take one forward, see ``Discriminator``.
        """
        c = self.config.loss
        penalise = self.gamma > 0 and (self.num_steps - 1) % c.penalty_every == 0
        reals, fakes = reals.detach().requires_grad_(penalise), fakes.detach().requires_grad_(penalise)
        views = [self._view(reals), self._view(fakes)]
        if c.gp:
            views.append(interpolate(*views))
        real, fake, *between = self._autocast(self._d, *views)
        adversarial = self._mean(self.loss.discriminator(*self._relate(real, fake)))
        if c.smoothing:  # -(1-s) log p - s log(1-p) = -log p + s x, where p = sigmoid(x)
            adversarial = adversarial + c.smoothing * self._mean(real)
        loss = adversarial
        found = {
            "loss/discriminator": adversarial,
            "d/real": self._mean(real),
            "d/fake": self._mean(fake),
            "d/sign": self._mean(real.sign()),
        }
        if penalise:
            found["loss/r1r2"] = self._mean(zero_centred_penalty([reals, fakes], torch.cat([real, fake])))
            loss = loss + self.gamma * c.penalty_every / 2 * found["loss/r1r2"]
        if c.gp:
            found["loss/gp"] = self._mean(one_centred_penalty(views[2], between[0]))
            loss = loss + c.gp * found["loss/gp"]
        if c.drift:  # Karras et al. 2018, appendix A.1
            loss = loss + c.drift * self._mean(real.square())
        if c.lecam:
            loss = loss + c.lecam * self._mean(lecam(real, fake, *self.anchors))
        _add(stats, found)
        return loss

    def generator_phase(self, pairs: Pairs) -> dict[str, Tensor]:
        """Make the fakes look real to the discriminator; they carry the generator's graph."""
        stats: dict[str, Tensor] = {}
        self.g_optimiser.zero_grad(set_to_none=True)
        with frozen(self.discriminator):
            for reals, fakes in self._accumulate(self._g, pairs):
                real = fakes.new_empty(0)
                if self.loss.relativistic:
                    real, fake = self._autocast(self.discriminator, self._view(reals), self._view(fakes))
                else:
                    (fake,) = self._autocast(self.discriminator, self._view(fakes))
                loss = self._mean(self.loss.generator(*self._relate(real, fake)))
                loss.backward()
                _add(stats, {"loss/generator": loss})
        self.g_optimiser.step()
        return stats

    def settle_average(self) -> None:
        """Make the average fit to draw: batch norm's statistics are measured on 1,024 latents, always the same."""
        random = torch.Generator().manual_seed(0)
        latents = (torch.randn(64, self.config.model.z_dim, generator=random).to(self.device) for _ in range(16))
        self.ema.settle(latents, **self.growth)

    @torch.no_grad()
    def draw(self, z: Tensor, average: bool = True) -> Tensor:
        """Pictures float ``[n, 3, size, size]`` of latents by the average generator (``settle_average`` first) or by
        the live one, with batch norm's running statistics."""
        generator = self.ema.module if average else self.generator
        generator.eval()
        images = (AtLevel(generator, **self.growth) if self.growth else generator)(z)
        self.generator.train()
        return images

    @torch.no_grad()
    def judge(self, images: Tensor) -> Tensor:
        """Critic values ``[n]`` of pictures ``[n, 3, size, size]`` as they are, uint8 or in [-1, 1], with batch norm's
        running statistics; nothing in the discriminator changes."""
        images = _to_float(images.to(self.device))
        return self._judge(resize_to_level(images, **self.growth) if self.growth else images)

    @torch.no_grad()
    def judge_fakes(self, z: Tensor) -> Tensor:
        """Critic values ``[n]`` of what the live generator makes of latents, both with running statistics."""
        self.generator.eval()
        fakes = self._autocast(self.generator, z).float()
        self.generator.train()
        return self._judge(fakes)

    def _judge(self, images: Tensor) -> Tensor:
        self.discriminator.eval()
        (critic,) = self._autocast(self.discriminator, images)
        self.discriminator.train()
        return critic

    def is_finite(self) -> bool:
        """Whether all weights of both networks are; waits for the device."""
        weights = (*self.generator.parameters(), *self.discriminator.parameters())
        return bool(torch.stack(torch._foreach_norm(list(weights))).isfinite().all().item())

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, of the bare modules."""
        return {name: part.state_dict() for name, part in self._stateful().items()} | {
            "num_steps": self.num_steps,
            "lr_scale": self.lr_scale,
            "anchors": self.anchors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """``state`` is that of a GAN of the same model configuration."""
        for name, part in self._stateful().items():
            if name != "adaptive" or name in state:  # a checkpoint from before ADA was switched on has none
                part.load_state_dict(state[name])
        self.num_steps, self.lr_scale = state["num_steps"], state["lr_scale"]
        self.anchors.copy_(state["anchors"])

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.module,
            "g_optimiser": self.g_optimiser,
            "d_optimiser": self.d_optimiser,
        }
        return parts | ({"adaptive": self.adaptive} if self.adaptive else {})

    def _parts(self, reals: Tensor) -> tuple[Tensor, ...]:
        return reals.tensor_split(self.config.accumulate)

    def _accumulate(self, wrapper: nn.Module, pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs in turn; ranks exchange gradients in the last one's backward only."""
        remaining = self.config.accumulate
        iterator = iter(pairs)
        while remaining:
            remaining -= 1
            if isinstance(wrapper, DistributedDataParallel):
                wrapper.require_backward_grad_sync = remaining == 0
            yield next(iterator)

    def _latents(self, reals: Tensor) -> Tensor:
        return torch.randn(len(reals), self.config.model.z_dim, device=self.device)

    @torch.no_grad()
    def _fakes(self, reals: Tensor) -> Tensor:
        """As many pictures as reals, to show to the discriminator."""
        return self._autocast(self.generator, self._latents(reals)).float()

    def _generate(self, z: Tensor) -> Tensor:
        return self._autocast(self._g, z).float()

    def _autocast(self, module: nn.Module, *inputs: Tensor):  # type: ignore[no-untyped-def]  # as the module returns
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return module(*inputs, **self.growth)

    def _prepare(self, reals: Tensor) -> Tensor:
        """Pictures on the device, float in [-1, 1], mirrored at random, at the resolution of the networks."""
        reals = _to_float(reals.to(self.device, non_blocking=True))
        reals = random_flip(reals) if self.config.augment.flip else reals
        reals = resize_to_level(reals, **self.growth) if self.growth else reals
        return reals.contiguous(memory_format=torch.channels_last)

    def _view(self, images: Tensor) -> Tensor:
        """What the discriminator sees of pictures."""
        images = augment(images, self.config.augment.policy, self.p)
        return images + self.noise * torch.randn_like(images) if self.noise else images

    def _relate(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Critic values as the loss takes them."""
        return (real - batch_mean(fake), fake - batch_mean(real)) if self.loss.average else (real, fake)

    def _mean(self, values: Tensor) -> Tensor:
        """This rank's part of the mean over the global batch, see ``scale``."""
        return values.sum() * self.scale

    def _feed_back(self, stats: dict[str, Tensor]) -> None:
        """Let what the critic says of this batch steer the augmentation and LeCam's anchors."""
        if not (self.adaptive or self.config.loss.lecam):
            return
        local = torch.stack([stats["d/real"], stats["d/fake"], stats["d/sign"]])
        means = mean_over_ranks(local)
        self.anchors.lerp_(means[:2], max(0.01, 1 / self.num_steps))
        if self.adaptive:
            self.adaptive.update(means[2], self.config.batch)


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _add(stats: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        stats[name] = stats[name] + value.detach() if name in stats else value.detach()


M = TypeVar("M", bound=nn.Module)


def _place(module: M, device: torch.device) -> M:
    """On the device, in the memory layout that convolutions are fastest in."""
    module.to(device)
    module.to(memory_format=torch.channels_last)
    return module


def _optimiser(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    o = config.optim
    if o.name == "rmsprop":
        return torch.optim.RMSprop(module.parameters(), lr=o.g_lr.start, foreach=True)
    return torch.optim.Adam(module.parameters(), lr=o.g_lr.start, betas=(o.beta1, o.beta2.start), eps=1e-8, fused=True)
