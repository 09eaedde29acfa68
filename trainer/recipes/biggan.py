"""BigGAN: class-conditional batch norm, projection, hinge loss, spectral norm, self-attention."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import Config, EMAConfig, LossConfig, ModelConfig, OptimConfig, constant
from trainer.recipes import dcgan


def make(size: int) -> Config:
    """Brock et al. 2019, section 3 and appendix C: hinge loss, two steps of D for one of G, Adam(5e-5 for G, 2e-4 for
    D, 0, 0.999), orthogonal initialisation, spectral norm in both networks.

    Self-attention is at 64x64 from 128 pixels on (appendix B), at half the side below. The batch is 256 instead of
    2048, and the networks have two thirds of the paper's 96 channels. The EMA has a half-life of 500 kimg instead of
    0.9999 per step, which in batches of 256 would be 1,774 kimg.
    """
    return replace(
        dcgan.published(size),
        recipe=f"biggan-{size}",
        model=ModelConfig(
            arch="biggan",
            size=size,
            z_dim=128,
            g_width=64,
            d_width=64,
            max_width=1024,
            attention=min(size // 2, 64),
            g_spectral_norm=True,
            conditional=True,
        ),
        loss=LossConfig("hinge", n_critic=2, share_batch=False),
        optim=OptimConfig(g_lr=constant(5e-5), d_lr=constant(2e-4), beta1=0.0, beta2=constant(0.999)),
        ema=EMAConfig(half_life_kimg=500, ramp=0.1),
        batch=256 if size <= 64 else 64,
        kimg=5000,
    )


def cpu(size: int) -> Config:
    """Narrow networks without self-attention and without spectral norm in G, batches of 16, one step of D for one of G
    at higher rates."""
    base = dcgan.small(size)
    return replace(
        base,
        recipe=f"biggan-cpu-{size}",
        model=ModelConfig(arch="biggan", size=size, z_dim=32, g_width=16, d_width=16, max_width=64, conditional=True),
        loss=LossConfig("hinge"),
        optim=OptimConfig(g_lr=constant(2e-4), d_lr=constant(4e-4), beta1=0.0, beta2=constant(0.999)),
    )
