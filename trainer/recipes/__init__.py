"""Recipes: complete configurations with a name, written as data, one module per system.

A recipe's name is a family and a size, ``r3gan-64``; the family alone takes the size of the data. With ``few`` before
the size, ``r3gan-few-64``, it is changed for few photographs; ``few`` alone is the default family's. Every value is an
option of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from catgan.command import UserError
from trainer.config import Config
from trainer.recipes import biggan, dcgan, fastgan, progan, r3gan, ralsgan, stylegan2, wgan
from trainer.recipes.few import few

SIZES = (32, 64, 128, 256, 512)
_EVAL_ON_CPU = 2048  # images per evaluation


@dataclass(frozen=True)
class Family:
    """Recipes that differ in size only."""

    summary: str
    make: Callable[[int], Config]


FAMILIES = {
    "dcgan": Family("DCGAN as published (Radford et al. 2016)", dcgan.published),
    "dcgan-keras": Family("DCGAN with smoothed labels, instance noise, dropout, a dense head, batch 200", dcgan.keras),
    "dcgan-cpu": Family("DCGAN in small batches, evaluated by its EMA: for a few CPU cores", dcgan.cpu),
    "wgan": Family("Wasserstein GAN with weight clipping (Arjovsky et al. 2017)", wgan.clipped),
    "wgan-gp": Family("Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)", wgan.penalised),
    "ralsgan": Family("relativistic average least squares (Jolicoeur-Martineau 2019)", ralsgan.make),
    "progan": Family("progressive growing (Karras et al. 2018)", progan.published),
    "progan-cpu": Family("progressive growing in two hundred thousand images, for a few CPU cores", progan.cpu),
    "fastgan": Family("few images: skip-layer excitation, D reconstructs reals (Liu et al. 2021)", fastgan.make),
    "fastgan-cpu": Family("FastGAN with narrow networks, for a few CPU cores", fastgan.cpu),
    "r3gan": Family("the modern recipe: relativistic loss, R1 + R2, residual networks (Huang et al. 2024)", r3gan.make),
    "r3gan-cpu": Family("R3GAN's loss on strided networks, for a few CPU cores", r3gan.cpu),
    "stylegan2": Family("styles, path length regularisation, truncation (Karras et al. 2020)", stylegan2.make),
    "biggan": Family("of images with classes: conditional batch norm, projection (Brock et al. 2019)", biggan.make),
    "biggan-cpu": Family("BigGAN with narrow networks, for a few CPU cores", biggan.cpu),
    "stylegan2-cpu": Family("StyleGAN2 with narrow networks, for a few CPU cores", stylegan2.cpu),
}
DEFAULT_CPU = "dcgan-cpu"
DEFAULT_GPU = "r3gan"


def _on(gpu: bool, config: Config) -> Config:
    """A recipe adapted to its hardware: on a CPU, fewer images per evaluation and no reader processes."""
    if gpu:
        return config
    return replace(
        config,
        eval=replace(config.eval, num=min(config.eval.num, _EVAL_ON_CPU)),
        loader=replace(config.loader, workers=0),
    )


def resolve(name: str | None, data_size: int | None, gpu: bool) -> Config:
    """The recipe called ``name``.

    Args:
        name: ``family-size``, ``family`` (the data's size, else the default one) or None (the default family), with
            ``few`` after the family or instead of it.
        data_size: side of the shards' images in pixels, if there are shards.
        gpu: whether training will run on GPUs; chooses the default family.

    Raises:
        UserError: no such recipe.
    """
    default = DEFAULT_GPU if gpu else DEFAULT_CPU
    name = name or default
    head, _, tail = name.rpartition("-")
    has_size = tail.isdecimal()
    system, size = (head, int(tail)) if has_size else (name, data_size or (64 if gpu else 32))
    family = default if system == "few" else system.removesuffix("-few")
    if family in FAMILIES and (size in SIZES or not has_size):
        config = FAMILIES[family].make(size)
        return _on(gpu, config if system == family else few(config))
    names = [*FAMILIES, *(f"{f}-{s}" for f in FAMILIES for s in SIZES)]
    near = difflib.get_close_matches(name.lower(), names, 1)
    raise UserError(
        f"no recipe {name!r}"
        + (f": did you mean {near[0]}?" if near else ".")
        + f" Families: {', '.join(FAMILIES)}, alone or with a size, e.g. r3gan-64 ({', '.join(map(str, SIZES))});"
        " for few photographs r3gan-few-64, or few alone"
    )
