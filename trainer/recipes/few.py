"""Few photographs: what any recipe changes to continue from a generator of similar images (``--init-from``)."""

from __future__ import annotations

from dataclasses import replace

from catgan.command import UserError
from trainer.config import Config, Schedule, constant

_KIMG = 1000  # StyleGAN2-ADA's advice for transfer; half the recipe's length if that is less


def few(base: Config) -> Config:
    """``base`` for some hundred images: DiffAugment in every image (Zhao et al. 2020; the recipe's transforms, else
    translation and cutout), half the length with all its schedules, four times the evaluations. A projected
    discriminator joins at once, since the samples are recognisable from the start.

    Freezing layers of the discriminator (``--optim.freeze-d``) and lower rates are left to the user: together they were
    worse in the comparison of docs/recipes.md.

    Raises:
        UserError: the recipe grows from a low resolution, to which ``--init-from`` would return.
    """
    if base.model.arch == "progan":
        raise UserError(f"no {base.recipe} for few photographs: it begins at a low resolution; take another system")
    kimg = min(base.kimg / 2, _KIMG)

    def shorter(schedule: Schedule) -> Schedule:
        return replace(schedule, kimg=schedule.kimg * kimg / base.kimg)

    augment, optim, track = base.augment, base.optim, base.track
    return replace(
        base,
        recipe=base.recipe.replace(f"-{base.model.size}", f"-few-{base.model.size}"),
        loss=replace(base.loss, gamma=shorter(base.loss.gamma)),
        augment=replace(
            augment,
            policy=augment.policy or ("translation", "cutout"),
            p=constant(1.0),
            noise=shorter(augment.noise),
        ),
        optim=replace(optim, g_lr=shorter(optim.g_lr), d_lr=shorter(optim.d_lr), beta2=shorter(optim.beta2)),
        projected=replace(base.projected, start_kimg=0.0),
        track=replace(track, snapshot_kimg=max(track.snapshot_kimg / 4, track.tick_kimg)),
        kimg=kimg,
    )
