"""Generators and discriminators.

A generator maps ``z [n, z_dim]`` to images ``[n, 3, size, size]``, nominally in [-1, 1]; a discriminator maps one or
more batches of images to one logit per image. Neither knows about devices or losses.
"""

from __future__ import annotations

from torch import nn

from trainer.config import Config, ModelConfig
from trainer.models.biggan import BigGANDiscriminator, BigGANGenerator
from trainer.models.common import Discriminator, Generator
from trainer.models.dcgan import DCGANDiscriminator, DCGANGenerator
from trainer.models.fastgan import FastGANDiscriminator, FastGANGenerator
from trainer.models.progan import AtLevel, ProGANDiscriminator, ProGANGenerator, resize_to_level
from trainer.models.r3gan import R3GANDiscriminator, R3GANGenerator
from trainer.models.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = [
    "ARCHITECTURES",
    "AtLevel",
    "Discriminator",
    "Generator",
    "build_discriminator",
    "build_generator",
    "full_resolution_kimg",
    "num_parameters",
    "resize_to_level",
]

ARCHITECTURES: dict[str, tuple[type[Generator], type[Discriminator]]] = {
    "biggan": (BigGANGenerator, BigGANDiscriminator),
    "dcgan": (DCGANGenerator, DCGANDiscriminator),
    "fastgan": (FastGANGenerator, FastGANDiscriminator),
    "progan": (ProGANGenerator, ProGANDiscriminator),
    "r3gan": (R3GANGenerator, R3GANDiscriminator),
    "stylegan2": (StyleGAN2Generator, StyleGAN2Discriminator),
}


def build_generator(config: ModelConfig) -> Generator:
    return ARCHITECTURES[config.arch][0](config)


def build_discriminator(config: ModelConfig) -> Discriminator:
    return ARCHITECTURES[config.arch][1](config)


def full_resolution_kimg(config: Config) -> float:
    """Thousands of images until progressive networks reach the full resolution; 0 for others."""
    return config.grow.full_resolution_kimg(config.model.size) if ARCHITECTURES[config.model.arch][0].grows else 0.0


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
