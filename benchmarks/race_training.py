"""Training and evaluation for race.py: a recipe or the plain loop behind one interface, trained for some minutes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import wait_for_device
from plain_dcgan import Z_DIM, PlainDCGAN
from torch import Tensor

from catgan.command import UserError, say
from catgan.dataset import Manifest, Split
from infer.grid import grid
from infer.latents import latents
from trainer.config import Config
from trainer.data.stream import eval_images
from trainer.ema import EMA
from trainer.metrics.catfid.manifold import NEIGHBOURS, precision_recall
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.kernel import kernel_distance
from trainer.networks import set_up_device
from trainer.recipes import resolve
from trainer.sample import generate
from trainer.step import GAN

PLAIN_BATCH = 64
IMAGES = 64  # generated or read at a time in an evaluation
GRID = 64  # images in a sample grid
MIN_NUM = NEIGHBOURS + 1
STEPS_PER_CLOCK = 10  # steps between two looks at the clock where each means waiting for a GPU

Sample = Callable[[Sequence[int]], Tensor]
"""Generates the images of some seeds, uint8 ``[len(seeds), 3, size, size]``."""


@dataclass(frozen=True)
class Contestant:
    """A training in progress."""

    batch: int
    step: Callable[[int], object]
    """``step(nimg)`` trains on one batch and updates the EMA; ``nimg`` is the number of images seen before."""
    recompute_ema_statistics: Callable[[], object]
    """Recomputes the EMA generator's batch-norm statistics; called before ``sample_ema``."""
    sample_ema: Sample
    sample_raw: Sample


def recipe_contestant(config: Config, images: Tensor, labels: Tensor, split: Split) -> Contestant:
    """A recipe on ``images``, uint8 ``[n, 3, size, size]``, on their device, trained as ``trainer.loop`` does.

    Args:
        labels: their classes, int64 ``[n]``, for a conditional recipe.
        split: where the images are from; generated images have classes as frequent as there.
    """
    set_up_device(config, images.device)
    gan = GAN(config, images.device)
    is_conditional = bool(config.model.classes)
    if is_conditional:
        gan.class_counts = split.class_counts

    def batch() -> tuple[Tensor, Tensor | None]:
        chosen = torch.randint(len(images), (config.batch,), device=images.device)
        return images[chosen], labels[chosen] if is_conditional else None

    def step(nimg: int) -> None:
        reals, classes = batch()
        more_reals, more_classes = batch() if gan.fresh_reals else (None, None)
        gan.step(reals, nimg, more_reals, classes, more_classes)
        gan.ema.update(gan.generator, config.batch, nimg + config.batch)

    def sample(raw: bool, seeds: Sequence[int]) -> Tensor:
        return generate(gan, seeds, raw, split.labels_of(seeds) if is_conditional else None)

    return Contestant(config.batch, step, gan.recompute_ema_statistics, partial(sample, False), partial(sample, True))


def plain_contestant(images: Tensor) -> Contestant:
    """The plain loop on ``images``, uint8 ``[n, 3, size, size]``, on their device, with the EMA of the recipe dcgan."""
    place, size = images.device, images.shape[-1]
    plain = PlainDCGAN(size, place)
    rule = resolve("dcgan", size, gpu=False).ema
    ema = EMA(plain.generator, rule.half_life_kimg * 1000, rule.ramp)

    def step(nimg: int) -> None:
        plain.step(images[torch.randint(len(images), (PLAIN_BATCH,), device=place)])
        ema.update(plain.generator, PLAIN_BATCH, nimg + PLAIN_BATCH)

    def recompute() -> None:
        random = torch.Generator().manual_seed(0)
        ema.recompute_statistics(torch.randn(64, Z_DIM, generator=random).to(place) for _ in range(16))

    @torch.no_grad()
    def sample(raw: bool, seeds: Sequence[int]) -> Tensor:
        generator = (plain.generator if raw else ema.module).eval()  # batch norm's running statistics, as exported
        made = generator(torch.from_numpy(latents(seeds, Z_DIM)).to(place))
        plain.generator.train()
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    return Contestant(PLAIN_BATCH, step, recompute, partial(sample, False), partial(sample, True))


def choose_split(manifest: Manifest, wanted: str, num: int) -> str:
    """The split to evaluate against; says which and why.

    With fewer reals than fakes a Fréchet distance is mostly the bias of the reals' covariance, so "auto" takes the val
    split only if it has ``num`` images.

    Raises:
        UserError: the split has too few images.
    """
    images = {name: split.images for name, split in manifest.splits.items()}
    split = wanted
    if wanted == "auto":
        split = "val" if images["val"] >= num else "train"
    if images[split] < MIN_NUM:
        raise UserError(f"the {split} split has {images[split]} images: evaluating needs at least {MIN_NUM}")
    say(f"evaluating against the {split} split, {images[split]:,} images (val has {images['val']:,}, --num is {num:,})")
    if images[split] < num:
        say(f"warning: fewer than --num {num:,} real images: all distances are biased upwards; kid is not")
    return split


class Scores:
    """Evaluates generators, each the same way.

    Args:
        evaluator: of the distances that decide.
        second: of the distance in the features of another network, one that no discriminator contains.
    """

    def __init__(self, evaluator: Evaluator, second: Evaluator) -> None:
        self.evaluator, self.second = evaluator, second
        self._real: Tensor | None = None

    def prepare(self) -> None:
        """Read the real images: all for the Fréchet distance (cached), as many as there are fakes for the rest."""
        e = self.evaluator
        e.prepare()
        self.second.prepare()
        batches = itertools.islice(eval_images(e.manifest, e.split, batch_size=IMAGES), -(-e.num_fake // IMAGES))
        self._real = torch.cat([e.extractor(images) for images in batches])[: e.num_fake]

    def measure(self, sample: Sample) -> dict[str, float]:
        """distance, kid, precision and recall, and distance_second in the second network, all of the same
        images."""
        assert self._real is not None, "prepare() first"
        seeds = range(self.evaluator.seed, self.evaluator.seed + self.evaluator.num_fake)
        images = torch.cat([sample(seeds[i : i + IMAGES]) for i in range(0, len(seeds), IMAGES)])

        def generated(wanted: Sequence[int]) -> Tensor:
            return images[[seed - self.evaluator.seed for seed in wanted]]

        fake = self.evaluator.features(generated)
        distance = self.evaluator.measure(fake, error_below=-math.inf)["value"]
        precision, recall = precision_recall(self._real, fake)
        return {
            "distance": round(distance, 2),
            "distance_second": round(self.second(generated, error_below=-math.inf)["value"], 2),
            "kid": round(kernel_distance(self._real, fake)[0], 5),
            "precision": round(precision, 4),
            "recall": round(recall, 4),
        }

    def distance(self, sample: Sample) -> float:
        """The Fréchet distance alone."""
        return round(self.evaluator(sample, error_below=-math.inf)["value"], 2)


def training_clock() -> float:
    """Seconds: on a GPU of wall time, on a CPU of processor time per thread, so that other programs on the machine
    cost a training nothing. On an idle machine the two are about equal."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time() / torch.get_num_threads()


def train(
    contestant: Contestant, label: str, minutes: float, intervals: int, scores: Scores, sheet: str
) -> dict[str, Any]:
    """Train for ``minutes`` of ``training_clock``, which is stopped during evaluations.

    Args:
        label: first words of the progress lines.
        intervals: evaluations, at equal intervals of training time, the last one at the end.
        sheet: path of the sample grids; ``-01.png``, ``-02.png``, ... is appended.

    Returns:
        ``curve`` with a point for each evaluation, ``images_per_second``, ``kimg`` and ``seconds`` of training.
    """
    curve: list[dict[str, Any]] = []
    nimg, trained = 0, 0.0
    steps = STEPS_PER_CLOCK if torch.cuda.is_available() else 1
    for i in range(1, intervals + 1):
        while trained < minutes * 60 * i / intervals:
            began = training_clock()
            for _ in range(steps):
                contestant.step(nimg)
                nimg += contestant.batch
            wait_for_device()
            trained += training_clock() - began
        contestant.recompute_ema_statistics()
        point = {
            "minutes": round(trained / 60, 3),
            "kimg": round(nimg / 1000, 3),
            **scores.measure(contestant.sample_ema),
            "distance_live": scores.distance(contestant.sample_raw),
        }
        curve.append(point)
        _save_sheet(contestant.sample_ema, Path(f"{sheet}-{i:02d}.png"))
        say(
            f"{label}: {point['minutes']:.2f} of {minutes:g} minutes, {point['kimg']:g} kimg at"
            f" {nimg / trained:.0f} images/s, distance {point['distance']:g} (raw {point['distance_live']:g}),"
            f" kid {point['kid']:g}, precision {point['precision']:.3f}, recall {point['recall']:.3f}"
        )
    return {
        "curve": curve,
        "images_per_second": round(nimg / trained, 1),
        "kimg": curve[-1]["kimg"],
        "seconds": round(trained, 2),
    }


def _save_sheet(sample: Sample, path: Path) -> None:
    """Save the images of seeds 0 to ``GRID`` - 1 as one grid."""
    grid(sample(range(GRID)).permute(0, 2, 3, 1).contiguous().cpu().numpy()).save(path)
