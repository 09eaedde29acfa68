"""StyleGAN2: a mapping network and styles, lazy R1 and path length regularisation."""

from __future__ import annotations

import math
from dataclasses import replace

from trainer.config import Config, EMAConfig, LossConfig, ModelConfig, OptimConfig, constant
from trainer.recipes import dcgan


def _loss(size: int, batch: int) -> LossConfig:
    """The non-saturating loss with R1 every 16 and path length regularisation every 8 steps (Karras et al. 2020,
    StyleGAN2, appendix B), style mixing for nine in ten fakes (Karras et al. 2019).

    Gamma is the heuristic of StyleGAN2-ADA's automatic configuration; the weight of path length regularisation is
    appendix B's, whose factor of 1 / size^2 is in the random direction here.
    """
    return LossConfig(
        "bce",
        gamma=constant(0.0002 * size**2 / batch),
        r2=False,
        penalty_every=16,
        path_length=math.log(2) / (math.log(size) - math.log(2)),
        path_every=8,
        style_mixing=0.9,
        share_batch=False,
    )


def make(size: int) -> Config:
    """Karras et al. 2020 with the values of StyleGAN2-ADA's automatic configuration for one GPU: two mapping layers, z
    of 512, half the channels (16384 over the side, at most 512), Adam(0.0025, 0, 0.99), batch 32, an EMA half-life of
    10 kimg.

    No noise inputs. Penalties are part of the step's loss and take no step of their own, so Adam's values need no
    correction for them. The minibatch standard deviation is that of the whole batch.
    """
    width, batch = 16384 // size, 32
    return replace(
        dcgan.published(size),
        recipe=f"stylegan2-{size}",
        model=ModelConfig(arch="stylegan2", size=size, z_dim=512, g_width=width, d_width=width, max_width=512),
        loss=_loss(size, batch),
        optim=OptimConfig(g_lr=constant(2.5e-3), d_lr=constant(2.5e-3), beta1=0.0, beta2=constant(0.99)),
        ema=EMAConfig(half_life_kimg=10),
        batch=batch,
        kimg=5000,
    )


def cpu(size: int) -> Config:
    """Narrow networks, batches of 16, and for a short training a learning rate of 0.008, four times the gamma and no
    style mixing: docs/recipes.md has a comparison."""
    base = dcgan.small(size)
    loss = _loss(size, base.batch)
    return replace(
        base,
        recipe=f"stylegan2-cpu-{size}",
        model=ModelConfig(arch="stylegan2", size=size, z_dim=64, g_width=16, d_width=16, max_width=64),
        loss=replace(loss, gamma=constant(4 * loss.gamma.start), style_mixing=0.0),
        optim=OptimConfig(g_lr=constant(8e-3), d_lr=constant(8e-3), beta1=0.0, beta2=constant(0.99)),
        kimg=200,
    )
