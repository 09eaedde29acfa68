"""Signs that a training goes wrong while its losses look fine: an overfitted discriminator, collapsed modes."""

from __future__ import annotations

import itertools

import torch

from infer.latents import latents
from trainer.config import Config
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images
from trainer.losses import LOSSES
from trainer.models import full_resolution_kimg
from trainer.step import GAN

_NUM = 512
_BATCH = 64
_GRACE, _GRACE_KIMG = 0.2, 10.0  # of a training, and at least: before that a generator draws noise
_OVERFITTED = 0.5


class CriticGap:
    """How much more the discriminator trusts pictures it trains on than pictures it has never seen.

    ``d/overfitting`` is ``(D(train) - D(val)) / (D(train) - D(fake))`` (Karras et al. 2020, eq. 1): 0 for a
    discriminator that generalises, 1 for one that takes unseen reals for fakes. The means are over up to 512 pictures
    each, in evaluation mode, so that nothing in the discriminator changes.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Without a val split there is nothing to compare with, and a call gives nothing."""
        # Batches of one size throughout: a discriminator may look at a batch's spread.
        self.batch = min(_BATCH, *(split.images for split in manifest.splits.values()))
        self.batches = {
            split: list(itertools.islice(eval_images(manifest, split, batch_size=self.batch), count))
            for split in ("train", "val")
            if self.batch and (count := min(_NUM, manifest.splits[split].images) // self.batch)
        }

    def __call__(self, gan: GAN) -> dict[str, float]:
        """Means of critic values by kind of picture; needs no other rank."""
        if not self.batches:
            return {}
        train, val = (torch.cat([gan.logits(b) for b in batches]).mean().item() for batches in self.batches.values())
        z = torch.from_numpy(latents(range(_NUM // self.batch * self.batch), gan.generator.z_dim)).to(gan.device)
        fake = torch.cat([gan.fake_logits(part) for part in z.split(self.batch)]).mean().item()
        found = {"d/train": train, "d/val": val}
        # Where reals are not above fakes the discriminator knows nothing yet, and the ratio would be noise.
        return found | ({"d/overfitting": (train - val) / (train - fake)} if train > fake else {})


def warnings(signs: dict[str, float], config: Config, nimg: int) -> list[str]:
    """What to tell about an evaluation's ``diversity`` and ``d/overfitting`` at ``nimg`` images.

    Nothing while networks know nothing yet, or are not grown up: that is no news.
    """
    found: list[str] = []
    if nimg / 1000 < max(_GRACE * config.kimg, _GRACE_KIMG, full_resolution_kimg(config)):
        return found
    if signs["diversity"] < config.stop.min_diversity:
        found.append(
            f"mode collapse? the pictures' features spread {signs['diversity']:.2f} times as much as the reals'"
            f" (--stop.min-diversity {config.stop.min_diversity:g}); look at the samples"
        )
    if signs.get("d/overfitting", 0.0) > _OVERFITTED:
        strength = "--augment.p.start 0.3 --augment.p.end 0.3"
        if LOSSES[config.loss.name].has_level:
            strength = "--augment.target 0.6"
        found.append(
            f"the discriminator knows its training pictures by heart (d/overfitting {signs['d/overfitting']:.2f});"
            f" augment more, as in --augment.policy colour translation cutout {strength}"
        )
    return found
