"""The latent whose image is nearest to a given one, by gradient descent through the generator.

As the projections of Abdal et al. 2019 and Karras et al. 2020, but never in the space of a mapping network: the
latents are the generator's own, z, and the distance is in the features of a network and in the pixels. In 100
dimensions the norm of a latent of N(0, I) is close to 10, and the generator has seen no others, so the norm has a
prior: its own distribution, as in Samuel et al. 2023 ("Norm-guided latent space exploration"); Menon et al. 2020
(PULSE) keep it constant instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infer.latents import latents
from trainer.features.networks import EFFLITE0
from trainer.features.weights import find_efflite0
from trainer.models import Generator
from trainer.models.projected import FrozenStages

CANDIDATES = 512
"""Seeds among whose images the starts are chosen."""
FRAMES = 60
"""Latents of the path from the start to the result, at most."""

_STRIDES = (4, 8, 16)
_PIXELS = 2.0  # weight of the mean squared difference of pixels in [-1, 1]
_PRIOR = 0.01  # weight of the norm's negative log density
_RATE = 0.1  # of Adam, falling to 0 along half a cosine
_CHUNK = 32  # candidates at a time


@dataclass(frozen=True)
class Found:
    """The result of ``search``."""

    z: Tensor
    """float32 ``[1, z_dim]``."""
    loss: float
    """``Distance`` of its image."""
    seed: int
    """The seed of the nearest image among the candidates."""
    seed_loss: float
    """``Distance`` of that image."""
    path: Tensor
    """The latents from the start to ``z``, float32 ``[<= FRAMES + 1, z_dim]``."""


class Distance:
    """How different images are from ``target``, ``[1, 3, size, size]`` in [-1, 1].

    The mean over EfficientNet-Lite0's maps at strides 4, 8 and 16 of the squared difference of the features, each
    place's normalised to unit length (as LPIPS, Zhang et al. 2018, eq. 1, without its learned weights), plus twice the
    mean squared difference of the pixels. The network's input is resized as for the metric.

    Raises:
        UserError: the network's package is not installed.
    """

    def __init__(self, target: Tensor) -> None:
        network = EFFLITE0.load(find_efflite0("projecting a photo"))
        stages = FrozenStages(network, EFFLITE0.offset, EFFLITE0.scale, _STRIDES)
        self._stages = stages.to(memory_format=torch.channels_last)
        self._target = target
        with torch.no_grad():
            self._maps = self._features(target)

    def __call__(self, images: Tensor) -> Tensor:
        """``[n, 3, size, size]`` in [-1, 1] -> ``[n]``, 0 for the target."""
        pairs = zip(self._features(images), self._maps, strict=True)
        features = torch.stack([(ours - theirs).square().sum(1).mean((1, 2)) for ours, theirs in pairs]).mean(0)
        return features + _PIXELS * (images - self._target).square().mean((1, 2, 3))

    def _features(self, images: Tensor) -> list[Tensor]:
        side = (EFFLITE0.size, EFFLITE0.size)
        resized = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=EFFLITE0.antialias)
        maps = self._stages(resized.contiguous(memory_format=torch.channels_last))
        return [F.normalize(x, dim=1) for x in maps]


def norm_prior(z: Tensor) -> Tensor:
    """The negative log density of the norms of ``z [n, z_dim]``, z_dim >= 2, under N(0, I): a chi distribution with
    z_dim degrees of freedom. ``[n]``, 0 at its mode, sqrt(z_dim - 1)."""
    freedom = z.shape[1] - 1
    squares = z.square().sum(1)
    return 0.5 * (squares - freedom - freedom * (squares / freedom).log())


def search(
    generator: Generator,
    target: Tensor,
    starts: int,
    steps: int,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Found:
    """Minimise ``Distance`` and ``norm_prior`` with Adam from several starts at once.

    The starts are the nearest of ``CANDIDATES`` seeds, from ``seed`` on. The same arguments give the same result on
    one machine with the same number of threads.

    Args:
        generator: in evaluation mode, on the CPU.
        target: ``[1, 3, size, size]`` in [-1, 1].
        starts: 1 to ``CANDIDATES``.
        steps: at least 1.
        report: called after each step with its number from 1 on and the smallest distance so far.
    """
    distance = Distance(target)
    seeds = range(seed, seed + CANDIDATES)
    candidates = torch.from_numpy(latents(seeds, generator.z_dim))
    with torch.no_grad():
        losses = torch.cat([distance(image(generator, z)) for z in candidates.split(_CHUNK)])
    order = losses.argsort(stable=True)[:starts]
    z = candidates[order].clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    best, best_losses = z.detach().clone(), losses[order]
    interval = -(-steps // FRAMES)
    path = []
    for step in range(steps + 1):
        found = distance(image(generator, z))
        is_better = found.detach() < best_losses
        best = torch.where(is_better[:, None], z.detach(), best)
        best_losses = torch.where(is_better, found.detach(), best_losses)
        if step % interval == 0 or step == steps:
            path.append(best)
        if step == steps:
            break
        optimiser.zero_grad()
        (found + _PRIOR * norm_prior(z)).sum().backward()
        optimiser.step()
        schedule.step()
        report(step + 1, float(best_losses.min()))
    winner = int(best_losses.argmin())
    return Found(
        best[winner][None],
        float(best_losses[winner]),
        seeds[int(order[0])],
        float(losses[order[0]]),
        torch.stack(path)[:, winner],
    )


def image(generator: Generator, z: Tensor) -> Tensor:
    """Images of ``z``, clamped to [-1, 1] as in an exported file."""
    return generator(z).clamp(-1.0, 1.0)
