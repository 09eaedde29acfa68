"""FastGAN: for small data sets, in hours on one GPU."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import (
    AugmentConfig,
    Config,
    EMAConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrackConfig,
    constant,
)
from trainer.recipes import dcgan


def make(size: int) -> Config:
    """Liu et al. 2021: hinge loss, the reconstruction of reals, DiffAugment with colour and translation in every image,
    Adam(2e-4, 0.5), z of 256, batches of 8 for 50 thousand steps, an EMA of 0.999 per step (a half-life of 5.5 kimg).

    Widths are within a factor of two of the paper's: 32 channels at 256x256, doubling down to 512 at 16x16.
    """
    width = 8192 // size
    return replace(
        dcgan.published(size),
        recipe=f"fastgan-{size}",
        model=ModelConfig(arch="fastgan", size=size, z_dim=256, g_width=width, d_width=width, max_width=512),
        loss=LossConfig("hinge", reconstruction=1.0),
        augment=AugmentConfig(policy=("colour", "translation"), p=constant(1.0)),
        optim=OptimConfig(g_lr=constant(2e-4), d_lr=constant(2e-4), beta1=0.5, beta2=constant(0.999)),
        ema=EMAConfig(half_life_kimg=5.5),
        track=TrackConfig(tick_kimg=5, snapshot_kimg=50, grid=64 if size <= 256 else 16),
        batch=8,
        kimg=400,
    )


def cpu(size: int) -> Config:
    """Narrow networks and batches of 16."""
    width = {32: 24, 64: 12}.get(size, 8)
    return replace(
        dcgan.small(size),
        recipe=f"fastgan-cpu-{size}",
        model=ModelConfig(arch="fastgan", size=size, z_dim=100, g_width=width, d_width=width, max_width=192),
        loss=LossConfig("hinge", reconstruction=1.0),
        augment=AugmentConfig(policy=("translation",), p=constant(1.0)),
        kimg=200,
    )
