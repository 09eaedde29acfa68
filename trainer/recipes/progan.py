"""Progressive growing: from 4x4 to the full resolution."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import Config, EMAConfig, GrowConfig, LossConfig, ModelConfig, OptimConfig, constant
from trainer.recipes import dcgan


def published(size: int) -> Config:
    """Karras et al. 2018, appendix A: WGAN-GP with drift, one critic step per generator step, Adam(1e-3, 0, 0.99), 600
    thousand images at each resolution and as many to fade in the next, up to 512 channels.

    Widths follow the paper's 16 channels at 1024x1024: 512 from 32x32 down, 256 at 64x64, 128 at 128x128, and so on.
    From 256x256 on the batch is halved; the paper's fell with the resolution to fit in memory.
    """
    width = max(128 * 128 // size, 16)
    return replace(
        dcgan.published(size),
        recipe=f"progan-{size}",
        model=ModelConfig(arch="progan", size=size, z_dim=512, g_width=width, d_width=width, max_width=512),
        grow=GrowConfig(start=4, hold_kimg=600, fade_kimg=600),
        loss=LossConfig("wasserstein", gp=10.0, drift=1e-3, share_batch=False),
        optim=OptimConfig(g_lr=constant(1e-3), d_lr=constant(1e-3), beta1=0.0, beta2=constant(0.99)),
        ema=EMAConfig(half_life_kimg=10),
        batch=64 if size <= 128 else 32,
        kimg=1200 * (size.bit_length() - 3) + 2000,
    )


def cpu(size: int) -> Config:
    """Small networks and a short schedule; the non-saturating loss with lazy R1 and R2 instead of WGAN-GP, which needs
    many critic steps."""
    return replace(
        dcgan.small(size),
        recipe=f"progan-cpu-{size}",
        model=ModelConfig(arch="progan", size=size, z_dim=64, g_width=16, d_width=16, max_width=128),
        grow=GrowConfig(start=8, hold_kimg=5, fade_kimg=10),
        loss=LossConfig("bce", gamma=constant(0.05), penalty_every=4),
        optim=OptimConfig(g_lr=constant(8e-3), d_lr=constant(8e-3), beta1=0.0, beta2=constant(0.99)),
        kimg=200,
    )
