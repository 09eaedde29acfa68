"""The Fréchet distance between generated and real images, as training computes it: all ranks share the work."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catgan.command import UserError, say
from catgan.dataset import Manifest
from catgan.files import cache_dir
from trainer.data.stream import eval_images, share
from trainer.distributed.collectives import broadcast, rank, sum_over_ranks, world_size
from trainer.features.extractors import MIN_FID, Extractor
from trainer.metrics.frechet import Gaussian, Moments, frechet_distance
from trainer.metrics.intervals import GROUPS, frechet_error
from trainer.metrics.numbers import is_same_metric

_BATCH = 64
_ROWS = 1024  # that are converted to float64 at a time
_CACHE_VERSION = 1


def metric_name(metric: str, extractor: str, num_fake: int, force: bool = False) -> str:
    """The name of a result, which tells how it was computed: "fid50k", "kid5k", "fd2k_efflite0", "kid300_efflite0".

    ``metric``, such as "fid" or "kid", is followed by the number of generated images, from 1,000 on in thousands,
    rounded down. A Fréchet distance is called FID only with the extractor "inception"; all other extractors are
    appended. "ppl" always names its extractor, because PPL alone means LPIPS on VGG16.

    Raises:
        UserError: a FID of fewer than 2,048 generated images, unless ``force``.
    """
    count = f"{num_fake // 1000}k" if num_fake >= 1000 else str(num_fake)
    if extractor != "inception" or metric == "ppl":
        return f"{'fd' if metric == 'fid' else metric}{count}_{extractor}"
    if metric == "fid" and num_fake < MIN_FID and not force:
        raise UserError(
            f"FID of {num_fake:,} generated images: at least {MIN_FID:,} are needed (--eval.num), or another network"
            " (--eval.extractor efflite0)"
        )
    return metric + count


def statistics_path(manifest: Manifest, splits: Sequence[str], extractor: Extractor) -> Path:
    """The file in the cache for the feature statistics of all images of ``splits``."""
    key = [
        _CACHE_VERSION,
        manifest.digest,
        "+".join(splits),
        extractor.name,
        extractor.weights_sha256,
        extractor.resize,
    ]
    return cache_dir() / f"real-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"


def load_statistics(path: Path) -> Gaussian | None:
    """Statistics from the cache; None if there is no such file, or, with a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        return Gaussian.load(path)
    except UserError as error:
        say(f"warning: {error}; computing the statistics again")
        return None


def save_statistics(path: Path, statistics: Gaussian) -> None:
    """Save statistics to the cache. A full disk is a warning only: they can be computed again."""
    try:
        statistics.save(path)
    except OSError as error:
        say(f"warning: the statistics of the real images are not cached: {path}: {error.strerror}")


class Evaluator:
    """Computes the Fréchet distance of generators from the images of one split, always in the same way.

    Call ``prepare`` once, then the evaluator with a function that generates the images of given seeds. Both are
    collective: all ranks of ``torch.distributed`` must call them.

    Args:
        extractor: the metric network, the same on all ranks.
        manifest: the real images; all images of ``split`` are used.
        num_fake: number of generated images; their seeds are ``seed`` to ``seed + num_fake - 1``.

    Raises:
        UserError: FID with fewer than 2,048 generated images, or a split with fewer than 2 images.
    """

    def __init__(
        self, extractor: Extractor, manifest: Manifest, num_fake: int = MIN_FID, split: str = "train", seed: int = 0
    ) -> None:
        self.name = metric_name("fid", extractor.name, num_fake)
        self.extractor, self.manifest, self.split = extractor, manifest, split
        self.num_fake, self.seed = num_fake, seed
        self.num_real = manifest.splits[split].images
        if min(self.num_real, num_fake) < 2:
            raise UserError(
                f"{self.name}: {self.num_real} real and {num_fake} generated images, at least 2 of each are needed"
            )
        self.real: Gaussian | None = None  # statistics of the real images, after prepare(), on rank 0 only

    def is_comparable(self, result: dict[str, Any]) -> bool:
        """Whether an earlier result on the same real images was computed in the same way as this evaluator's. One whose
        number of generated images is unknown was not."""
        own = (self.extractor.weights_sha256, self.extractor.resize, self.seed)
        same_way = own == tuple(result[key] for key in ("weights_sha256", "resize", "seed"))
        return same_way and is_same_metric(result, {"name": self.name, "n_fake": self.num_fake})

    def prepare(self) -> None:
        """Load the statistics of the real images from the cache, or compute them by reading the split once.

        Later calls do nothing. Rank 0 alone decides whether they are cached: if each rank decided, one could wait in a
        collective that another skips.

        Raises:
            UserError: more unusable images than ``manifest.max_broken`` allows.
        """
        path = statistics_path(self.manifest, [self.split], self.extractor) if rank() == 0 else None
        if path and self.real is None:
            self.real = load_statistics(path)
        if broadcast(self.real is not None):
            return
        if rank() == 0:
            say(f"reading {self.num_real:,} real images for {self.name} (once, then cached)")
        moments = Moments(self.extractor.dim, self.extractor.device)
        for images in eval_images(self.manifest, self.split, rank=rank(), world_size=world_size(), batch_size=_BATCH):
            moments.update(self.extractor(images))
        moments.all_reduce()
        # Each rank skips a few unusable images; in total they may be too many.
        if moments.n < (1 - self.manifest.max_broken) * self.num_real:
            raise UserError(
                f"only {moments.n} of {self.num_real} {self.split} images of {self.manifest.root} can be used: "
                "`catdata verify` finds damaged shards"
            )
        if path:
            self.real = moments.gaussian()
            # Images may be missing because of a bad connection: only complete statistics are cached.
            if moments.n == self.num_real:
                save_statistics(path, self.real)

    def __call__(
        self,
        generate: Callable[[Sequence[int]], Tensor],
        error_below: float = math.inf,
        more: Callable[[Tensor], dict[str, float]] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a generator.

        Args:
            generate: images uint8 ``[len(seeds), 3, H, W]`` of the given seeds. Each seed is requested once, on one of
                the ranks.
            error_below: the standard error, which takes as long as ten distances, is computed for values below this.
            more: computes further figures from the features on rank 0, which become the entry ``more``.

        Returns:
            The same on every rank: name, value (the distance, lower is better), diversity (total variance of the
            features relative to that of the real images; near 0 after mode collapse), n_real, n_fake, extractor,
            weights_sha256, resize, seed, seconds, and standard_error (see ``frechet_error``) of a value below
            ``error_below`` and of at least 20 images.
        """
        began = time.perf_counter()
        features = self.features(generate)
        measured = self.measure(features, error_below) if rank() == 0 else {}
        if more and rank() == 0:
            measured["more"] = more(features)
        return broadcast(
            {
                "name": self.name,
                **measured,
                "n_fake": self.num_fake,
                "extractor": self.extractor.name,
                "weights_sha256": self.extractor.weights_sha256,
                "resize": self.extractor.resize,
                "seed": self.seed,
                "seconds": round(time.perf_counter() - began, 2),
            }
        )

    def features(self, generate: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """The features float32 ``[num_fake, dim]`` of a generator's images, in the order of their seeds, on every rank.
        A collective."""
        features = torch.zeros(self.num_fake, self.extractor.dim, device=self.extractor.device)
        start, stop = share(self.num_fake, rank(), world_size())
        for first in range(start, stop, _BATCH):
            last = min(first + _BATCH, stop)
            images = generate(range(self.seed + first, self.seed + last))
            assert len(images) == last - first, (len(images), first, last)
            features[first:last] = self.extractor(images)
        return sum_over_ranks(features)  # the other ranks' rows are 0

    def measure(self, features: Tensor, error_below: float) -> dict[str, Any]:
        """value, diversity, n_real and standard_error as in ``__call__``, from ``features``, on rank 0."""
        assert self.real is not None, "prepare() first"
        moments = Moments(self.extractor.dim, self.extractor.device)
        for rows in features.split(_ROWS):
            moments.update(rows)
        fake = moments.gaussian()
        value = frechet_distance(self.real, fake)
        measured = {
            "value": value,
            "diversity": float(np.trace(fake.cov) / np.trace(self.real.cov)),
            "n_real": self.real.n,
        }
        if value < error_below and len(features) >= 2 * GROUPS:
            measured["standard_error"] = frechet_error(self.real, features)
        return measured
