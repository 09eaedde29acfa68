"""Few photographs: what any recipe changes to continue from a generator of similar images (``--init-from``)."""

from __future__ import annotations

from dataclasses import replace

from catgan.command import UserError
from trainer.config import Config, Schedule, constant

_RATE = 0.5  # of the recipe's learning rates: the weights are close to their goal, and few images are soon memorised
_KIMG = 1000  # StyleGAN2-ADA's advice for transfer; half the recipe's length if that is less


def few(base: Config) -> Config:
    """``base`` for some hundred images: DiffAugment with all its transforms (Zhao et al. 2020), the discriminator's two
    layers next to the image frozen (Freeze-D, Mo et al. 2020), half the learning rates, half the length with all its
    schedules, four times the evaluations. A projected discriminator joins at once, since the samples are recognisable
    from the start.

    Raises:
        UserError: the recipe grows from a low resolution, to which ``--init-from`` would return.
    """
    if base.model.arch == "progan":
        raise UserError(f"no {base.recipe} for few photographs: it begins at a low resolution; take another system")
    kimg = min(base.kimg / 2, _KIMG)
    length = kimg / base.kimg

    def changed(schedule: Schedule, factor: float = 1.0) -> Schedule:
        return Schedule(factor * schedule.start, factor * schedule.end, length * schedule.kimg)

    optim = base.optim
    return replace(
        base,
        recipe=base.recipe.replace(f"-{base.model.size}", f"-few-{base.model.size}"),
        loss=replace(base.loss, gamma=changed(base.loss.gamma)),
        augment=replace(
            base.augment,
            policy=("colour", "translation", "cutout"),
            p=constant(1.0),
            noise=changed(base.augment.noise),
        ),
        optim=replace(
            optim,
            g_lr=changed(optim.g_lr, _RATE),
            d_lr=changed(optim.d_lr, _RATE),
            beta2=changed(optim.beta2),
            freeze_d=2,
        ),
        projected=replace(base.projected, start_kimg=0.0),
        track=replace(base.track, snapshot_kimg=max(base.track.snapshot_kimg / 4, base.track.tick_kimg)),
        kimg=kimg,
    )
