"""DCGAN: as published, as popular Keras repositories train it, and for a few CPU cores."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import (
    AugmentConfig,
    Config,
    EMAConfig,
    EvalConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ProjectedConfig,
    Schedule,
    TrackConfig,
    constant,
)


def published(size: int) -> Config:
    """Radford et al. 2016, section 4: 64 channels, z of 100, Adam(2e-4, 0.5), BCE.

    The batch is that of the widely copied PyTorch example, 64; the paper has 128.
    """
    return Config(
        recipe=f"dcgan-{size}",
        model=ModelConfig(arch="dcgan", size=size, z_dim=100, g_width=64, d_width=64),
        loss=LossConfig("bce"),
        augment=AugmentConfig(flip=True),
        optim=OptimConfig(g_lr=constant(2e-4), d_lr=constant(2e-4), beta1=0.5, beta2=constant(0.999)),
        ema=EMAConfig(half_life_kimg=20),
        loader=LoaderConfig(workers=4),
        eval=EvalConfig(num=50_000),
        track=TrackConfig(tick_kimg=10, snapshot_kimg=200),
        batch=64,
        kimg=2000,
    )


def keras(size: int) -> Config:
    """What popular Keras DCGANs on cats do to weaken the discriminator: labels of 0.9, decaying Gaussian noise on its
    input, dropout, a dense layer from z, the same latents in both phases, batch 200, Adam(1e-4, 0.5)."""
    base = published(size)
    return replace(
        base,
        recipe=f"dcgan-keras-{size}",
        model=replace(base.model, g_head="dense", d_dropout=0.3),
        loss=LossConfig("bce", smoothing=0.1, share_batch=True),
        augment=AugmentConfig(flip=True, noise=Schedule(0.1, 0.0, 500)),
        optim=replace(base.optim, g_lr=constant(1e-4), d_lr=constant(1e-4)),
        batch=200,
    )


def small(size: int) -> Config:
    """DCGAN for two cores: narrow networks and small batches allow many steps, and the EMA averages out their noise."""
    base = published(size)
    # Deeper networks need a lower rate: at 64x64 and 4e-4 the weights change faster than the EMA can follow.
    width, rate = {32: (48, 4e-4), 64: (24, 2e-4)}.get(size, (16, 2e-4))
    return replace(
        base,
        recipe=f"dcgan-cpu-{size}",
        model=replace(base.model, g_width=width, d_width=width),
        optim=replace(base.optim, g_lr=constant(rate), d_lr=constant(rate)),
        ema=EMAConfig(half_life_kimg=10, ramp=0.1),
        loader=LoaderConfig(workers=0),
        eval=EvalConfig(num=2048),
        track=TrackConfig(tick_kimg=2, snapshot_kimg=20),
        batch=16,
        kimg=100,
    )


def cpu(size: int) -> Config:
    """``small``, from 64x64 on with DiffAugment (Zhao et al. 2020), without which D wins in two of four seeds at 64x64,
    and images are blurred at 128x128. At 64x64 also with a projected discriminator (Sauer et al. 2021) once faces are
    recognisable."""
    if size < 64:
        return small(size)
    augment = AugmentConfig(policy=("translation", "cutout"), p=constant(1.0))
    augmented = replace(small(size), augment=augment, kimg=200)
    if size > 64:
        return augmented
    projected = ProjectedConfig(weight=3.0, start_kimg=40)
    return replace(augmented, projected=projected, ema=EMAConfig(half_life_kimg=20, ramp=0.1))
