"""Few photographs: what any recipe changes to continue from a generator of similar images (``--init-from``)."""

from __future__ import annotations

from dataclasses import replace

from catgan.command import UserError
from trainer.config import Config, Schedule, constant

_RATE = 0.5  # of the recipe's learning rates: the weights are close to their goal, and few images are soon memorised
_KIMG = 1000  # StyleGAN2-ADA's advice for transfer; half the recipe's length if that is less


def few(base: Config) -> Config:
    """``base`` for some hundred images: DiffAugment with all its transforms (Zhao et al. 2020), the discriminator's two
    layers next to the image frozen (Freeze-D, Mo et al. 2020), half the learning rates, half the length. A projected
    discriminator joins at once, since the samples are recognisable from the start.

    Raises:
        UserError: the recipe grows from a low resolution, to which ``--init-from`` would return.
    """
    if base.model.arch == "progan":
        raise UserError(f"no {base.recipe} for few photographs: it begins at a low resolution; take another system")
    return replace(
        base,
        recipe=base.recipe.replace(f"-{base.model.size}", f"-few-{base.model.size}"),
        augment=replace(base.augment, policy=("colour", "translation", "cutout"), p=constant(1.0)),
        optim=replace(base.optim, g_lr=_slower(base.optim.g_lr), d_lr=_slower(base.optim.d_lr), freeze_d=2),
        projected=replace(base.projected, start_kimg=0.0),
        kimg=min(base.kimg / 2, _KIMG),
    )


def _slower(rate: Schedule) -> Schedule:
    return Schedule(_RATE * rate.start, _RATE * rate.end, rate.kimg)
