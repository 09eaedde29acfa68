"""The trainings that equal_time.py compares, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from plain_dcgan import Z_DIM, PlainDCGAN
from torch import Tensor, nn

from trainer.config import Config
from trainer.ema import EMA
from trainer.recipes import dcgan
from trainer.step import GAN

PLAIN = "plain"
PLAIN_BATCH = 64


@dataclass
class Contestant:
    """A training in progress. ``step(nimg)`` trains on one batch, the average included."""

    name: str
    live: nn.Module
    average: nn.Module
    z_dim: int
    batch: int
    step: Callable[[int], object]


def _draw(pictures: Tensor, batch: int) -> Tensor:
    return pictures[torch.randint(len(pictures), (batch,))]


def plain_contestant(pictures: Tensor, place: torch.device) -> Contestant:
    """The plain loop on ``pictures``, uint8 ``[n, 3, size, size]``, with the average of the recipe dcgan."""
    plain = PlainDCGAN(pictures.shape[-1], place)
    rule = dcgan(pictures.shape[-1]).ema
    ema = EMA(plain.generator, rule.half_life_kimg * 1000, rule.ramp)

    def step(nimg: int) -> None:
        plain.step(_draw(pictures, PLAIN_BATCH))
        ema.update(plain.generator, PLAIN_BATCH, nimg + PLAIN_BATCH)

    return Contestant(PLAIN, plain.generator, ema.module, Z_DIM, PLAIN_BATCH, step)


def recipe_contestant(config: Config, pictures: Tensor, place: torch.device) -> Contestant:
    """A recipe of ours on ``pictures``, as ``trainer.loop`` trains it."""
    gan = GAN(config, place)

    def step(nimg: int) -> None:
        more_reals = None if config.loss.share_batch else _draw(pictures, config.batch)
        gan.step(_draw(pictures, config.batch), nimg, more_reals)
        gan.ema.update(gan.generator, config.batch, nimg + config.batch)

    return Contestant(config.recipe, gan.generator, gan.ema.module, config.model.z_dim, config.batch, step)
