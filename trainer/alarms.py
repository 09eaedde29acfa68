"""Signs that a training goes wrong while its losses look fine: an overfitted discriminator, collapsed modes."""

from __future__ import annotations

import itertools

import torch

from infer.latents import latents
from trainer.config import StopConfig
from trainer.data.shards import Manifest
from trainer.data.stream import eval_images
from trainer.step import GAN

_NUM = 512
_BATCH = 64
_GRACE = 0.2
_OVERFITTED = 0.5


class CriticGap:
    """How much more the discriminator trusts pictures it trains on than pictures it has never seen.

    ``d/overfitting`` is ``(D(train) - D(val)) / (D(train) - D(fake))`` (Karras et al. 2020, eq. 1): 0 for a
    discriminator that generalises, 1 for one that takes unseen reals for fakes. The means are over up to 512 pictures
    each, in evaluation mode, so that nothing in the discriminator changes.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Without a val split there is nothing to compare with, and a call gives nothing."""
        splits = ("train", "val") if manifest.splits["val"].images else ()
        self.batches = {
            split: list(itertools.islice(eval_images(manifest, split, batch_size=_BATCH), _NUM // _BATCH))
            for split in splits
        }

    def __call__(self, gan: GAN) -> dict[str, float]:
        """Means of critic values by kind of picture; needs no other rank."""
        if not self.batches:
            return {}
        train, val = (torch.cat([gan.judge(b) for b in batches]).mean().item() for batches in self.batches.values())
        z = torch.from_numpy(latents(range(_NUM), gan.generator.z_dim)).to(gan.device)
        fake = torch.cat([gan.judge(gan.draw(part, average=False)) for part in z.split(_BATCH)]).mean().item()
        overfitting = (train - val) / (train - fake) if train != fake else 0.0
        return {"d/train": train, "d/val": val, "d/overfitting": overfitting}


def warnings(signs: dict[str, float], config: StopConfig, progress: float) -> list[str]:
    """What to tell about an evaluation's ``diversity`` and ``d/overfitting``.

    Args:
        progress: share of the training that is done; an untrained generator has little diversity, and that is no news.
    """
    found = []
    if progress >= _GRACE and signs["diversity"] < config.min_diversity:
        found.append(
            f"mode collapse? the pictures' features spread {signs['diversity']:.2f} times as much as the reals'"
            f" (--stop.min-diversity {config.min_diversity:g}); look at the samples"
        )
    if signs.get("d/overfitting", 0.0) > _OVERFITTED:
        found.append(
            f"the discriminator knows its training pictures by heart (d/overfitting {signs['d/overfitting']:.2f});"
            " augment more, as in --augment.policy colour translation cutout --augment.target 0.6"
        )
    return found
