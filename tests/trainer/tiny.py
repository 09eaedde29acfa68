"""Every recipe with networks that take milliseconds."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import Config, EvalConfig, GrowConfig, LoaderConfig, Schedule, TrackConfig
from trainer.recipes import FAMILIES


def tiny(family: str, size: int = 32, batch: int = 8) -> Config:
    """The recipe's losses, penalties, optimisers and augmentation on networks of a few channels; whatever it does over
    thousands of images it does over dozens. A snapshot is 64 images, a training 192."""
    c = FAMILIES[family].make(size)

    def shortly(schedule: Schedule) -> Schedule:
        return replace(schedule, kimg=min(schedule.kimg, 0.1))

    return replace(
        c,
        model=replace(c.model, z_dim=8, g_width=4, d_width=4, max_width=8, blocks=1, group_width=4),
        grow=GrowConfig(start=c.grow.start, hold_kimg=0.03, fade_kimg=0.04),
        loss=replace(c.loss, gamma=shortly(c.loss.gamma), n_critic=min(c.loss.n_critic, 2)),
        augment=replace(c.augment, p=shortly(c.augment.p), noise=shortly(c.augment.noise)),
        optim=replace(c.optim, g_lr=shortly(c.optim.g_lr), d_lr=shortly(c.optim.d_lr), beta2=shortly(c.optim.beta2)),
        loader=LoaderConfig(workers=0, shuffle_buffer=30),
        eval=EvalConfig(extractor="efflite0", num=16),
        track=TrackConfig(tick_kimg=0.032, snapshot_kimg=0.064, grid=4),
        batch=batch,
        kimg=0.192,
        precision="fp32",
    )
