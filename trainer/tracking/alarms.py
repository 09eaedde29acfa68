"""Signs of a failing training: a discriminator that wins or overfits, mode collapse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from catgan.dataset import Manifest
from infer.latents import latents
from trainer.config import Config
from trainer.data.stream import eval_batches
from trainer.losses import LOSSES
from trainer.models import full_resolution_kimg
from trainer.step import GAN

_NUM = 512
_BATCH = 64
_GRACE, _GRACE_KIMG = 0.2, 10.0  # of the training, in kimg: no warnings before both
_OVERFITTED = 0.5
# Of bce, where 2 ln 2 = 1.39 is chance. At 64x64 DCGANs that failed had 0.31 to 0.39, others 0.46 and more. At 32x32
# the loss says nothing: good trainings also fall to 0.31.
_WON, _WON_SIZE = 0.4, 64


class OverfittingCheck:
    """Compares the discriminator's logits on images of the train split, of the val split, and generated ones.

    ``d/overfitting`` is ``(D(train) - D(val)) / (D(train) - D(fake))`` (Karras et al. 2020, eq. 1): 0 for a
    discriminator that generalises, 1 for one that cannot tell unseen reals from fakes. D(...) are means over up to 512
    images each, in evaluation mode, so that the discriminator does not change.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Reads the images, with their classes if they have any. Without a val split, calls return nothing."""
        self.manifest = manifest
        # All batches have the same size, since a discriminator may use the deviation within a batch.
        self.batch = min(_BATCH, *(split.images for split in manifest.splits.values()))
        is_labelled = manifest.is_labelled
        read = {
            split: list(itertools.islice(eval_batches(manifest, split, 0, 1, self.batch, is_labelled), count))
            for split in ("train", "val")
            if self.batch and (count := min(_NUM, manifest.splits[split].images) // self.batch)
        }
        self.batches = {split: [images for images, _ in batches] for split, batches in read.items()}
        self.labels = {split: [labels for _, labels in batches] for split, batches in read.items() if is_labelled}

    def __call__(self, gan: GAN) -> dict[str, float]:
        """The metrics ``d/train``, ``d/val`` and ``d/overfitting``. Not collective: one rank may call it alone."""
        if not self.batches:
            return {}
        train, val = (
            torch.cat([gan.logits(*given) for given in self._reals(split)]).mean().item() for split in self.batches
        )
        seeds = range(_NUM // self.batch * self.batch)
        z = torch.from_numpy(latents(seeds, gan.generator.z_dim)).to(gan.device)
        split = self.manifest.splits["train"]
        given = [z, torch.tensor(split.labels_of(seeds))] if split.class_counts else [z]
        parts = zip(*(values.split(self.batch) for values in given), strict=True)
        fake = torch.cat([gan.fake_logits(*part) for part in parts]).mean().item()
        found = {"d/train": train, "d/val": val}
        # Where logits of reals are not above those of fakes, the discriminator is untrained and the ratio is noise.
        return found | ({"d/overfitting": (train - val) / (train - fake)} if train > fake else {})

    def _reals(self, split: str) -> Iterable[tuple[Tensor, ...]]:
        """Images, and their classes if they have any."""
        return zip(*(source[split] for source in (self.batches, self.labels) if split in source), strict=True)


def warnings(signs: dict[str, float], config: Config, nimg: int) -> list[str]:
    """Warnings about an evaluation's ``diversity`` and ``d/overfitting`` and the latest ``loss/discriminator`` at
    ``nimg`` images.

    None early in a training and below full resolution, where low diversity is normal.
    """
    found: list[str] = []
    if nimg / 1000 < max(_GRACE * config.kimg, _GRACE_KIMG, full_resolution_kimg(config)):
        return found
    can_tell = config.loss.name == "bce" and config.model.size >= _WON_SIZE
    if can_tell and signs.get("loss/discriminator", math.inf) < _WON:
        found.append(
            f"the discriminator wins (its loss is {signs['loss/discriminator']:.2f}; 1.39 is chance), and the generator"
            " may learn nothing or collapse. If samples do not improve, augment more, for example --augment.policy"
            " translation cutout --augment.p 1, or train longer with another --seed"
        )
    if signs["diversity"] < config.stop.min_diversity:
        found.append(
            f"possible mode collapse: the spread of the generated images' features is {signs['diversity']:.2f} of the"
            f" reals' (--stop.min-diversity {config.stop.min_diversity:g}); look at the samples"
        )
    if signs.get("d/overfitting", 0.0) > _OVERFITTED:
        strength = "--augment.p.start 0.3 --augment.p.end 0.3"
        if LOSSES[config.loss.name].has_level:
            strength = "--augment.target 0.6"
        found.append(
            f"the discriminator overfits the training images (d/overfitting {signs['d/overfitting']:.2f}); augment"
            f" more, for example --augment.policy colour translation cutout {strength}"
        )
    return found
