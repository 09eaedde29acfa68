"""Wasserstein GANs: with weight clipping, and with a gradient penalty."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import Config, LossConfig, OptimConfig, constant
from trainer.recipes import dcgan


def clipped(size: int) -> Config:
    """Arjovsky et al. 2017, algorithm 1: weights within 0.01, five critic steps per generator step, RMSprop(5e-5),
    batch 64, DCGAN networks with batch norm."""
    base = dcgan.published(size)
    return replace(
        base,
        recipe=f"wgan-{size}",
        loss=LossConfig("wasserstein", n_critic=5, clip=0.01, share_batch=False),
        optim=OptimConfig("rmsprop", g_lr=constant(5e-5), d_lr=constant(5e-5), beta2=constant(0.99)),
    )


def penalised(size: int) -> Config:
    """Gulrajani et al. 2017, algorithm 1: lambda 10, five critic steps per generator step, Adam(1e-4, 0, 0.9), batch
    64, no batch norm in the critic; with the drift term of Karras et al. 2018."""
    base = dcgan.published(size)
    return replace(
        base,
        recipe=f"wgan-gp-{size}",
        model=replace(base.model, d_norm="none"),
        loss=LossConfig("wasserstein", n_critic=5, gp=10.0, drift=1e-3, share_batch=False),
        optim=OptimConfig(g_lr=constant(1e-4), d_lr=constant(1e-4), beta1=0.0, beta2=constant(0.9)),
    )
