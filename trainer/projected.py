"""A second discriminator that joins a training late: on frozen features, beside the recipe's own.

Once the generator makes faces, it removes what the recipe's own discriminator does not see: docs/recipes.md has a
measurement.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from trainer.config import Config
from trainer.distributed.collectives import sum_over_ranks
from trainer.distributed.parallel import frozen, wrap
from trainer.features.networks import EFFLITE0
from trainer.features.weights import find_efflite0
from trainer.models.projected import FrozenStages, Heads, Projection

_ALONE = 1000  # images that the heads see before the generator follows them


class ProjectedDiscriminator:
    """The frozen network, its projection, the trained heads and their optimiser.

    Each iteration the heads take one step on the generator's fakes (hinge loss, as Sauer et al. 2021), then their
    gradient at the fakes is added to that of the recipe's own discriminator, scaled to ``weight`` times its norm. All
    sums are those over the global batch.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int, bf16: bool) -> None:
        c = config.projected
        self.weight, self.start = c.weight, c.start_kimg * 1000
        self.device, self.bf16, self.scale = device, bf16, world_size / config.batch
        self.batch, self.num_images = config.batch, 0
        network = EFFLITE0.load(find_efflite0("--projected.weight"))
        self.stages = FrozenStages(network, EFFLITE0.offset, EFFLITE0.scale, c.strides)
        self.projection = Projection(self.stages.channels, c.strides).to(device)
        self.heads = Heads(config.model.size, c.strides).to(device)
        # On a CPU at 64x64 bf16 takes 1.5 times as long as fp32 (AMD EPYC, Zen 5): its convolutions are depthwise.
        self.stages.to(device, dtype=torch.bfloat16 if bf16 and device.type == "cuda" else None)
        for module in (self.stages, self.heads):
            module.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.heads.parameters(), lr=c.lr, betas=(0.0, 0.99), fused=True)
        self._heads = wrap(self.heads, world_size)

    def has_joined(self, nimg: int) -> bool:
        return nimg >= self.start

    def set_lr(self, lr: float) -> None:
        """Set the heads' learning rate, which a checkpoint's optimiser brings along otherwise."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def add_to(self, gradient: Tensor, reals: Tensor, fakes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Train the heads on one batch, then add their gradient at the fakes to the given one.

        Args:
            gradient: that of the generator's loss at ``fakes``, ``[n, 3, size, size]``.
            reals, fakes: ``[n, 3, size, size]`` in [-1, 1], not augmented.

        Returns:
            The sum, and scalars of the heads' step for the log.
        """
        fakes = fakes.detach().requires_grad_()
        fake_maps = self.stages(fakes)
        with torch.no_grad():
            real_maps = self.stages(reals)
            if self.num_images == 0:
                squares = sum_over_ranks(self.projection.mean_squares(real_maps) * len(reals))
                self.projection.calibrate(squares / self.batch)
        real_features, fake_features = (self._autocast(self.projection, maps) for maps in (real_maps, fake_maps))
        stats = self._train_heads(real_features, [x.detach() for x in fake_features])
        self.num_images += self.batch
        if self.num_images <= _ALONE:
            return gradient, stats
        with frozen(self.heads):
            loss = self._sum([-fake for (fake,) in self._autocast(self.heads, fake_features)])
            (own,) = torch.autograd.grad(loss, fakes)
        norm, own_norm = sum_over_ranks(torch.stack([gradient.square().sum(), own.square().sum()])).sqrt()
        return gradient + self.weight * norm / (own_norm + 1e-12) * own, stats

    def _train_heads(self, real_features: list[Tensor], fake_features: list[Tensor]) -> dict[str, Tensor]:
        self.optimiser.zero_grad(set_to_none=True)
        logits = self._autocast(self._heads, real_features, fake_features)
        reals, fakes = [real for real, _ in logits], [fake for _, fake in logits]
        loss = self._sum([relu(1 - real) for real in reals]) + self._sum([relu(1 + fake) for fake in fakes])
        loss.backward()
        self.optimiser.step()
        count = len(logits)
        return {
            "loss/projected": loss.detach(),
            "projected/real": self._sum(reals).detach() / count,
            "projected/fake": self._sum(fakes).detach() / count,
        }

    def _autocast(self, module: nn.Module, *inputs: list[Tensor]) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return module(*inputs)

    def _sum(self, logits: list[Tensor]) -> Tensor:
        """This rank's part of the sum over heads of the mean over the global batch and the places of a map."""
        return torch.stack([values.mean(dim=1).sum() for values in logits]).sum() * self.scale

    def state_dict(self) -> dict[str, Any]:
        return {
            "projection": self.projection.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "num_images": self.num_images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("projection", "heads", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.num_images = state["num_images"]
