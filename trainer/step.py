"""One iteration of GAN training: a discriminator phase, then a generator phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.augment import AdaptiveProbability, augment, random_flip
from trainer.config import Config
from trainer.distributed.collectives import batch_mean, mean_over_ranks
from trainer.distributed.parallel import freeze_first, frozen, sync_gradients, wrap
from trainer.losses import (
    LOSSES,
    finite_difference_penalty,
    interpolate,
    lecam,
    one_centred_penalty,
    perturb,
    zero_centred_penalty,
)
from trainer.models import resize_to_level
from trainer.models.batchnorm import BatchNorm
from trainer.models.stylegan2 import mix_styles
from trainer.networks import Condition, Networks, all_finite, to_float
from trainer.path_length import PathLength, path_lengths
from trainer.projected import ProjectedDiscriminator

Stats = dict[str, Tensor]
"""Scalars on the device by metric name."""
MakeFakes = Callable[..., Tensor]
"""As many fakes as the given reals ``[n, 3, h, w]``, of the classes of the ``Condition`` given as keywords."""


class GAN(Networks):
    """The networks and their optimisers; ``step`` trains them.

    With several ranks each network has a DistributedDataParallel wrapper of its own, used only in the phase that
    trains it (one joint wrapper would see unused parameters: pytorch-lightning#20328). ``_maker`` and ``_judge`` are
    generator and discriminator in the phase of the other one. With ``config.compile`` all of these are compiled;
    evaluations use the bare modules.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int = 1) -> None:
        super().__init__(config, device)
        self.loss = LOSSES[config.loss.name]
        # Whether the generator phase wants other reals: only relativistic losses look at any there.
        self.fresh_reals = self.loss.relativistic and not config.loss.share_batch
        self.g_optimiser = _optimiser(self.generator, config)
        self.d_optimiser = _optimiser(self.discriminator, config)
        # Ranks may hold shares of the batch that differ by one image; DDP averages over ranks, so a rank's sum
        # times this gives the mean over the global batch.
        self.scale = world_size / config.batch
        self.num_steps = 0
        self.lr_scale = 1.0
        """Factor of the learning rates; lower after a rollback."""
        a = config.augment
        self.adaptive = AdaptiveProbability(a.p.start, a.target, a.target_kimg, device) if a.target else None
        self.anchors = torch.zeros(2, device=device)  # LeCam's running means of the logits of reals and fakes
        self.anchor_steps = 0  # that the anchors are of; fewer than num_steps if a resume switched LeCam on
        self.path_length = PathLength(device) if config.loss.path_length else None
        freeze_first(self.discriminator, config.optim.freeze_d)
        networks: list[nn.Module] = [self.generator, self.discriminator]
        self._maker, self._judge = (
            [_compiled(module, world_size) for module in networks] if config.compile else networks
        )
        self._g = wrap(self._maker, world_size, self.generator.grows)
        self._d = wrap(self._judge, world_size, self.generator.grows)
        with_projected = config.projected.weight > 0
        self.projected = ProjectedDiscriminator(config, device, world_size, self.bf16) if with_projected else None
        self.schedule(0)

    def schedule(self, nimg: int) -> None:
        """Set everything that follows from the position: learning rates, penalty, augmentation, resolution."""
        c, o = self.config, self.config.optim
        self.nimg = nimg
        beta2 = o.beta2(nimg)
        decay = {"betas": (o.beta1, beta2)} if o.name == "adam" else {"alpha": beta2}
        for optimiser, lr in ((self.g_optimiser, o.g_lr), (self.d_optimiser, o.d_lr)):
            for group in optimiser.param_groups:
                group.update(lr=lr(nimg) * self.lr_scale, **decay)
        if self.projected is not None:
            self.projected.set_lr(c.projected.lr * self.lr_scale)
        self.gamma = c.loss.gamma(nimg)
        self.p: float | Tensor = self.adaptive.p if self.adaptive else c.augment.p(nimg)
        self.noise = c.augment.noise(nimg)
        self.set_level(nimg)

    def step(
        self,
        reals: Tensor,
        nimg: int,
        more_reals: Tensor | None = None,
        labels: Tensor | None = None,
        more_labels: Tensor | None = None,
    ) -> Stats:
        """Train the discriminator on one batch, and the generator too in every ``n_critic``-th call.

        Args:
            reals: this rank's part of the batch, uint8 or float in [-1, 1] ``[n, 3, size, size]``.
            nimg: images seen by all ranks before this step.
            more_reals: other reals for the generator phase, wanted if ``fresh_reals``; None: the same ones.
            labels, more_labels: classes of the reals, int64 ``[n]``, if there are classes. Fakes get the same, so that
                they do not depend on the number of ranks.

        Returns:
            Detached scalars on the device, nothing here waits for it. Their mean over ranks is that over the batch.
        """
        c = self.config.loss
        self.schedule(nimg)
        self.num_steps += 1
        train_generator = self.num_steps % c.n_critic == 0
        reals = self._prepare(reals)
        if c.share_batch and train_generator:
            condition = self.condition(labels)
            fakes = self._fakes(reals, **condition)
            stats = self.discriminator_phase([reals], lambda _, **__: fakes.detach(), [condition])
            return stats | self.generator_phase([reals], lambda _, **__: fakes, [condition])
        parts, conditions = self._split(reals, labels)
        stats = self.discriminator_phase(parts, self._detached_fakes, conditions)
        if train_generator:
            if more_reals is not None:
                parts, conditions = self._split(self._prepare(more_reals), more_labels)
            stats |= self.generator_phase(parts, self._fakes, conditions)
        return stats

    def discriminator_phase(
        self, parts: Sequence[Tensor], make_fakes: MakeFakes, conditions: Sequence[Condition] = ()
    ) -> Stats:
        """Train the discriminator to tell reals from fakes; ``parts`` of the batch, and the classes of each, accumulate
        gradients."""
        stats: Stats = {}
        self.d_optimiser.zero_grad(set_to_none=True)
        for i, (reals, condition) in enumerate(zip(parts, conditions or [{}] * len(parts), strict=True)):
            sync_gradients(self._d, i == len(parts) - 1)
            self._discriminator_loss(reals, make_fakes(reals, **condition), stats, **condition).backward()
        self.d_optimiser.step()
        if clip := self.config.loss.clip:
            # Not those of --optim.freeze-d.
            trained: list[Tensor] = [weights for weights in self.discriminator.parameters() if weights.requires_grad]
            with torch.no_grad():
                torch._foreach_clamp_min_(trained, -clip)
                torch._foreach_clamp_max_(trained, clip)
        self._update_feedback(stats)
        return stats

    def _discriminator_loss(self, reals: Tensor, fakes: Tensor, stats: Stats, **condition: Any) -> Tensor:
        """The loss of one part of the batch, penalties included; adds to ``stats``.

        All images take one forward, see ``Discriminator``. R1 and R2 are those of the images before augmentation (Huang
        et al. 2024), every ``penalty_every`` steps; with ``no-r2`` R1 alone (Karras et al. 2020).
        """
        c = self.config.loss
        penalise = self.gamma > 0 and (self.num_steps - 1) % c.penalty_every == 0
        exact, finite = penalise and c.penalty == "exact", penalise and c.penalty == "finite-difference"
        reals, fakes = reals.detach().requires_grad_(exact), fakes.detach().requires_grad_(exact and c.r2)
        penalised = [reals, fakes] if c.r2 else [reals]
        if finite:
            pairs = [self._view(torch.stack([images, perturb(images)])) for images in penalised]
            views = [pair[0] for pair in pairs] + ([] if c.r2 else [self._view(fakes)]) + [pair[1] for pair in pairs]
        else:
            views = [self._view(reals), self._view(fakes)]
        if c.gp:
            views.append(interpolate(*views))
        # The quadrants take turns, so that it is the same one on all ranks and after a resume.
        reconstruct = {"quadrant": self.num_steps % 4} if self.discriminator.reconstructs else {}
        real, fake, *more = self.autocast(self._d, *views, fp32=finite, **condition, **reconstruct)
        loss = self._mean(self.loss.discriminator(*self._relative(real, fake)))
        if c.smoothing:  # -(1-s) log p - s log(1-p) = -log p + s x, where p = sigmoid(x)
            loss = loss + c.smoothing * self._mean(real)
        _add(stats, "loss/discriminator", loss)
        _add(stats, "d/real", self._mean(real))
        _add(stats, "d/fake", self._mean(fake))
        _add(stats, "d/sign", self._mean(real.sign()))
        if penalise:
            logits = [real, fake] if c.r2 else [real]
            if finite:
                r1r2 = self._mean(finite_difference_penalty(logits, more))
            else:
                r1r2 = self._mean(zero_centred_penalty(penalised, torch.cat(logits)))
            loss = loss + self.gamma * c.penalty_every / 2 * r1r2
            _add(stats, "loss/r1r2", r1r2)
        if c.gp:
            gp = self._mean(one_centred_penalty(views[2], more[0]))
            loss = loss + c.gp * gp
            _add(stats, "loss/gp", gp)
        if c.drift:  # Karras et al. 2018, appendix A.1
            loss = loss + c.drift * self._mean(real.square())
        if c.lecam:
            loss = loss + c.lecam * self._mean(lecam(real, fake, *self.anchors))
        if reconstruct:
            error = self._mean(more[-1])
            loss = loss + c.reconstruction * error
            _add(stats, "loss/reconstruction", error)
        return loss

    def generator_phase(
        self, parts: Sequence[Tensor], make_fakes: MakeFakes, conditions: Sequence[Condition] = ()
    ) -> Stats:
        """Train the generator to make fakes look real; ``make_fakes`` keeps the generator's graph."""
        stats: Stats = {}
        conditions = conditions or [{}] * len(parts)
        self.g_optimiser.zero_grad(set_to_none=True)
        c = self.config.loss
        if self.path_length and (self.num_steps // c.n_critic - 1) % c.path_every == 0:
            self._add_path_length(self.path_length, parts[0], stats, **conditions[0])
        with frozen(self.discriminator):
            for i, (reals, condition) in enumerate(zip(parts, conditions, strict=True)):
                sync_gradients(self._g, i == len(parts) - 1)
                fakes = make_fakes(reals, **condition)
                real = fakes.new_empty(0)
                if self.loss.relativistic:
                    real, fake = self.autocast(self._judge, self._view(reals), self._view(fakes), **condition)
                else:
                    (fake,) = self.autocast(self._judge, self._view(fakes), **condition)
                loss = self._mean(self.loss.generator(*self._relative(real, fake)))
                self._backward(loss, reals, fakes, stats)
                _add(stats, "loss/generator", loss)
        self.g_optimiser.step()
        return stats

    def _add_path_length(self, path_length: PathLength, reals: Tensor, stats: Stats, **condition: Any) -> None:
        """Add the gradients of the path length penalty, for as many other latents as the first part has, every
        ``path_every`` steps (lazy regularisation, Karras et al. 2020, appendix B). DistributedDataParallel averages
        them with those of the batch."""
        sync_gradients(self._g, False)
        z = self._latents(reals)
        offset = torch.zeros_like(z).requires_grad_()
        images = self.autocast(self._g, z, offset, **condition).float()
        penalty = path_length.penalty(path_lengths(images, offset))
        (self.config.loss.path_length * self.config.loss.path_every * penalty).backward()
        _add(stats, "loss/path_length", penalty)
        _add(stats, "g/path_length", path_length.mean.clone())

    def _backward(self, loss: Tensor, reals: Tensor, fakes: Tensor, stats: Stats) -> None:
        """The generator's gradients of ``loss``, with those of the projected discriminator once it has joined."""
        if self.projected is None or not self.projected.has_joined(self.nimg):
            loss.backward()
            return
        (gradient,) = torch.autograd.grad(loss, fakes)
        gradient, found = self.projected.add_to(gradient, reals, fakes)
        fakes.backward(gradient)
        stats.update(found)

    def _split(self, reals: Tensor, labels: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Condition]]:
        """The parts of a batch that accumulate gradients, and the classes of each."""
        parts = reals.tensor_split(self.config.accumulate)
        if labels is None:
            return parts, [{}] * len(parts)
        return parts, [self.condition(label) for label in labels.tensor_split(self.config.accumulate)]

    def _fakes(self, reals: Tensor, **condition: Any) -> Tensor:
        """As many fakes as reals, with the generator's graph."""
        return self._generate(self._mixed(self._latents(reals)), **condition)

    @torch.no_grad()
    def _detached_fakes(self, reals: Tensor, **condition: Any) -> Tensor:
        return self.autocast(self._maker, self._mixed(self._latents(reals)), **condition).float()

    def _generate(self, z: Tensor, **condition: Any) -> Tensor:
        return self.autocast(self._g, z, **condition).float()

    def _latents(self, reals: Tensor) -> Tensor:
        return torch.randn(len(reals), self.config.model.z_dim, device=self.device)

    def _mixed(self, z: Tensor) -> Tensor:
        """With style mixing, latents for each layer: a part of the samples gets those of others from a layer on."""
        p = self.config.loss.style_mixing
        return mix_styles(z, torch.randn_like(z), self.generator.num_styles, p) if p else z

    def _prepare(self, reals: Tensor) -> Tensor:
        """Reals on the device, float in [-1, 1], mirrored at random, at the resolution of the networks."""
        reals = to_float(reals.to(self.device, non_blocking=True))
        reals = random_flip(reals) if self.config.augment.flip else reals
        reals = resize_to_level(reals, **self.growth) if self.growth else reals
        return reals.contiguous(memory_format=torch.channels_last)

    def _view(self, images: Tensor) -> Tensor:
        """Images as the discriminator gets them: augmented, with instance noise, the same for all versions of an image
        (see ``trainer.augment``)."""
        images = augment(images, self.config.augment.policy, self.p)
        return images + self.noise * images.new_empty(images.shape[-4:]).normal_() if self.noise else images

    def _relative(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as the loss takes them: for a relativistic average loss less the mean of the other side."""
        return (real - batch_mean(fake), fake - batch_mean(real)) if self.loss.average else (real, fake)

    def _mean(self, values: Tensor) -> Tensor:
        """This rank's part of the mean over the global batch, see ``scale``."""
        return values.sum() * self.scale

    def _update_feedback(self, stats: Stats) -> None:
        """Update ADA's probability and LeCam's anchors from this batch's logits."""
        if not (self.adaptive or self.config.loss.lecam):
            return
        means = mean_over_ranks(torch.stack([stats["d/real"], stats["d/fake"], stats["d/sign"]]))
        self.anchor_steps += 1
        self.anchors.lerp_(means[:2], max(0.01, 1 / self.anchor_steps))
        if self.adaptive:
            self.adaptive.update(means[2], self.config.batch)

    def state_dict(self) -> dict[str, Any]:
        """All that training changes, of the bare modules."""
        return {name: part.state_dict() for name, part in self._stateful().items()} | {
            "num_steps": self.num_steps,
            "lr_scale": self.lr_scale,
            "anchors": self.anchors,
            "anchor_steps": self.anchor_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """``state`` is that of a GAN of the same model configuration."""
        for name, part in self._stateful().items():
            # A checkpoint from before one of these was switched on has none.
            if name in state or name not in ("adaptive", "projected", "path_length"):
                part.load_state_dict(state[name])
        self.num_steps, self.lr_scale = state["num_steps"], state["lr_scale"]
        self.anchors.copy_(state["anchors"])
        # A checkpoint from before they were counted has means of all its steps or, without LeCam and ADA, none.
        self.anchor_steps = state.get("anchor_steps", self.num_steps if state["anchors"].any() else 0)

    def is_finite(self) -> bool:
        """Whether all weights that this training changes are; waits for the device."""
        return super().is_finite() and (self.projected is None or all_finite(self.projected.heads.parameters()))

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.module,
            "g_optimiser": self.g_optimiser,
            "d_optimiser": self.d_optimiser,
        }
        optional = {"adaptive": self.adaptive, "projected": self.projected, "path_length": self.path_length}
        return parts | {name: part for name, part in optional.items() if part}


def _add(stats: Stats, name: str, value: Tensor) -> None:
    stats[name] = stats[name] + value.detach() if name in stats else value.detach()


def _compiled(module: nn.Module, world_size: int) -> nn.Module:
    """``module`` compiled; batch norm over ranks is left out, since its collectives cannot be traced."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm) and world_size > 1:
            norm.forward = torch.compiler.disable(norm.forward)  # type: ignore[method-assign]
    compiled: Any = torch.compile(module)
    return compiled


def _optimiser(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    o = config.optim
    if o.name == "rmsprop":
        return torch.optim.RMSprop(module.parameters(), lr=o.g_lr.start, foreach=True)
    return torch.optim.Adam(module.parameters(), lr=o.g_lr.start, betas=(o.beta1, o.beta2.start), eps=1e-8, fused=True)
