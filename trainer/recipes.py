"""Recipes: complete configurations with a name, written as data.

A recipe's name is a family and a size, ``r3gan-64``; the family alone takes the size of the data. Every value can be
changed on the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from infer.command import UserError
from trainer.config import (
    AugmentConfig,
    Config,
    EMAConfig,
    EvalConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Schedule,
    TrackConfig,
    constant,
)

SIZES = (32, 64, 128)
MANY = 50_000  # pictures judged where a GPU makes them


@dataclass(frozen=True)
class Family:
    """Recipes that differ in size only."""

    summary: str
    make: Callable[[int], Config]


def dcgan(size: int) -> Config:
    """Radford et al. 2016, section 4: ngf = ndf = 64, z of 100, Adam(2e-4, 0.5), batch 128, BCE."""
    return Config(
        recipe=f"dcgan-{size}",
        model=ModelConfig(arch="dcgan", size=size, z_dim=100, g_width=64, d_width=64),
        loss=LossConfig("bce"),
        augment=AugmentConfig(flip=True),
        optim=OptimConfig(g_lr=constant(2e-4), d_lr=constant(2e-4), beta1=0.5, beta2=constant(0.999)),
        ema=EMAConfig(half_life_kimg=20),
        loader=LoaderConfig(workers=4),
        eval=EvalConfig(num=MANY),
        track=TrackConfig(tick_kimg=10, snapshot_kimg=200),
        batch=128,
        kimg=2000,
    )


def r3gan(size: int) -> Config:
    """Huang et al. 2024: RpGAN + R1 + R2, residual networks without normalisation, everything on cosine ramps.

    Gamma grows with the picture's area: the paper's 64x64 faces take 2 -> 0.2, its 256x256 faces 150 -> 15; at 32 and
    128 the values lie on the line between (0.5 at 32, 16 at 128).
    """
    gamma = {32: 0.5, 64: 2.0, 128: 16.0}.get(size, 2.0 * (size / 64) ** 3)
    ramp = 5000.0
    return Config(
        recipe=f"r3gan-{size}",
        model=ModelConfig(arch="r3gan", size=size, z_dim=64, g_width=96, d_width=96, max_width=384),
        loss=LossConfig("rpgan", gamma=Schedule(gamma, gamma / 10, ramp), share_batch=False),
        augment=AugmentConfig(policy=("colour", "translation", "cutout"), p=Schedule(0.0, 0.3, ramp)),
        optim=OptimConfig(
            g_lr=Schedule(2e-4, 5e-5, ramp), d_lr=Schedule(2e-4, 5e-5, ramp), beta1=0.0, beta2=Schedule(0.9, 0.99, ramp)
        ),
        ema=EMAConfig(half_life_kimg=500),
        loader=LoaderConfig(workers=4),
        eval=EvalConfig(num=MANY),
        track=TrackConfig(tick_kimg=10, snapshot_kimg=200),
        batch=256 if size <= 64 else 64,
        kimg=ramp,
    )


def dcgan_cpu(size: int) -> Config:
    """DCGAN for two cores: small batches make many steps, and the average hides their noise."""
    base = dcgan(size)
    return replace(
        base,
        recipe=f"dcgan-cpu-{size}",
        model=replace(base.model, g_width=_cpu_width(size), d_width=_cpu_width(size)),
        optim=replace(base.optim, g_lr=constant(3e-4), d_lr=constant(3e-4)),
        ema=EMAConfig(half_life_kimg=10, ramp=0.1),
        loader=LoaderConfig(workers=0),
        eval=EvalConfig(num=2048),
        track=TrackConfig(tick_kimg=2, snapshot_kimg=20),
        batch=16,
        kimg=100,
    )


def r3gan_cpu(size: int) -> Config:
    """R3GAN's loss for two cores: strided networks instead of residual ones, and lazy penalties."""
    base = dcgan_cpu(size)
    return replace(
        base,
        recipe=f"r3gan-cpu-{size}",
        model=replace(base.model, d_norm="none"),
        loss=LossConfig("rpgan", gamma=constant(0.5), penalty_every=4),
        augment=AugmentConfig(policy=("colour", "translation", "cutout"), p=Schedule(0.0, 0.1, 100)),
    )


def _cpu_width(size: int) -> int:
    """Channels at half the picture's side, such that a step's cost grows slowly with the size."""
    return max(64 * 32 // size, 16)


FAMILIES = {
    "dcgan": Family("DCGAN as published (GPU)", dcgan),
    "dcgan-cpu": Family("DCGAN in small batches, for a few CPU cores", dcgan_cpu),
    "r3gan": Family("the modern recipe: relativistic loss, R1 + R2, residual networks (GPU)", r3gan),
    "r3gan-cpu": Family("R3GAN's loss on strided networks, for a few CPU cores", r3gan_cpu),
}
DEFAULT_CPU = "dcgan-cpu"
DEFAULT_GPU = "r3gan"


def resolve(name: str | None, data_size: int | None, gpu: bool) -> Config:
    """The recipe called ``name``.

    Args:
        name: ``family-size``, ``family`` (the data's size, else the default one) or None (the default family).
        data_size: side of the shards' pictures in pixels, if there are shards.
        gpu: whether training will run on GPUs; chooses the default family.

    Raises:
        UserError: no such recipe.
    """
    name = name or (DEFAULT_GPU if gpu else DEFAULT_CPU)
    if name in FAMILIES:
        return FAMILIES[name].make(data_size or (64 if gpu else 32))
    family, _, size = name.rpartition("-")
    if family in FAMILIES and size.isdecimal() and int(size) in SIZES:
        return FAMILIES[family].make(int(size))
    names = [*FAMILIES, *(f"{f}-{s}" for f in FAMILIES for s in SIZES)]
    near = difflib.get_close_matches(name, names, 1)
    raise UserError(
        f"no recipe {name!r}"
        + (f"; did you mean {near[0]}?" if near else "")
        + f"; families: {', '.join(FAMILIES)}, alone or with a size, e.g. r3gan-64 ({', '.join(map(str, SIZES))})"
    )
