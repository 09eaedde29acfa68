"""R3GAN: the relativistic paired loss with both zero-centred penalties."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import (
    AugmentConfig,
    Config,
    EMAConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Schedule,
    Transform,
    constant,
)
from trainer.recipes import dcgan

_POLICY: tuple[Transform, ...] = ("colour", "translation", "cutout")


def make(size: int) -> Config:
    """Huang et al. 2024: RpGAN + R1 + R2, residual networks without normalisation, cosine schedules.

    The paper's 64x64 faces take a gamma of 2 -> 0.2 and its 256x256 faces 150 -> 15; eight times per doubling, which is
    close to both, gives the other sizes (0.25 at 32, 16 at 128).
    """
    gamma = 2.0 * (size / 64) ** 3
    ramp = 5000.0
    return replace(
        dcgan.published(size),
        recipe=f"r3gan-{size}",
        model=ModelConfig(arch="r3gan", size=size, z_dim=64, g_width=96, d_width=96, max_width=384),
        loss=LossConfig("rpgan", gamma=Schedule(gamma, gamma / 10, ramp), share_batch=False),
        augment=AugmentConfig(policy=_POLICY, p=Schedule(0.0, 0.3, ramp)),
        optim=OptimConfig(
            g_lr=Schedule(2e-4, 5e-5, ramp), d_lr=Schedule(2e-4, 5e-5, ramp), beta1=0.0, beta2=Schedule(0.9, 0.99, ramp)
        ),
        ema=EMAConfig(half_life_kimg=500, ramp=0.1),
        batch=256 if size <= 64 else 64,
        kimg=ramp,
    )


def cpu(size: int) -> Config:
    """R3GAN's loss for two cores: strided networks instead of residual ones, and lazy penalties. At 64x64 with the
    DiffAugment and the projected discriminator of ``dcgan.cpu``."""
    base = dcgan.small(size)
    config = replace(
        base,
        recipe=f"r3gan-cpu-{size}",
        model=replace(base.model, d_norm="none"),
        loss=LossConfig("rpgan", gamma=constant(0.05), penalty_every=4),
        augment=AugmentConfig(policy=_POLICY, p=Schedule(0.0, 0.1, 100)),
    )
    if size != 64:
        return config
    late = dcgan.cpu(size)
    return replace(config, augment=late.augment, projected=late.projected, kimg=late.kimg)
