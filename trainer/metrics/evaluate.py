"""The distance between generated and real pictures, as training uses it: all ranks share the work."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catgan.command import UserError, say
from catgan.files import cache_dir
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images, share
from trainer.distributed.collectives import broadcast, rank, world_size
from trainer.features.extractors import MIN_FID, Extractor
from trainer.metrics.frechet import Gaussian, Moments, frechet_distance

_BATCH = 64
_CACHE_VERSION = 1


def metric_name(metric: str, extractor: str, num_fake: int, force: bool = False) -> str:
    """The name of a result, which says how it was measured.

    ``metric`` is "fid" or "kid"; the number of fakes follows, in thousands, rounded down, from 1,000 on. A Fréchet
    distance is called FID only for the extractor "inception", all others are named after theirs: "fid50k",
    "kid5k", "fd2k_efflite0", "kid300_efflite0". "ppl" names its extractor always: by itself it means LPIPS on VGG16.

    Raises:
        UserError: a FID of fewer than 2,048 fakes, unless ``force``.
    """
    count = f"{num_fake // 1000}k" if num_fake >= 1000 else str(num_fake)
    if extractor != "inception" or metric == "ppl":
        return f"{'fd' if metric == 'fid' else metric}{count}_{extractor}"
    if metric == "fid" and num_fake < MIN_FID and not force:
        raise UserError(
            f"FID of {num_fake:,} generated pictures: at least {MIN_FID:,} are needed (--eval.num), or another network"
            " (--eval.extractor efflite0)"
        )
    return metric + count


def cached_statistics(manifest: Manifest, splits: Sequence[str], extractor: Extractor) -> Path:
    """Where the statistics of these splits' pictures lie, once somebody has measured them all."""
    parts = [
        _CACHE_VERSION,
        manifest.digest,
        "+".join(splits),
        extractor.name,
        extractor.weights_sha256,
        extractor.resize,
    ]
    return cache_dir() / f"real-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npz"


def recall_statistics(path: Path) -> Gaussian | None:
    """What ``remember_statistics`` left at ``path``; None if there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        return Gaussian.load(path)
    except UserError as error:
        say(f"warning: {error}; measuring again")
        return None


def remember_statistics(path: Path, statistics: Gaussian) -> None:
    """Keep statistics for the next time. A cache that is full costs that time, nothing else."""
    try:
        statistics.save(path)
    except OSError as error:
        say(f"warning: statistics of the real pictures are not kept: {path}: {error.strerror}")


class Evaluator:
    """Measures generators against the pictures of one split, the same way each time.

    ``prepare`` once, then call with a function that makes the pictures of given seeds. Every rank of
    ``torch.distributed`` takes part in both.

    Args:
        extractor: the network that judges, the same on all ranks.
        manifest: the real pictures; all of ``split`` are used.
        num_fake: generated pictures, those of the seeds ``seed`` to ``seed + num_fake - 1``.

    Raises:
        UserError: FID with fewer than 2,048 fakes, or a split with fewer than 2 pictures.
    """

    def __init__(
        self, extractor: Extractor, manifest: Manifest, num_fake: int = MIN_FID, split: str = "train", seed: int = 0
    ) -> None:
        self.name = metric_name("fid", extractor.name, num_fake)
        self.extractor, self.manifest, self.split = extractor, manifest, split
        self.num_fake, self.seed = num_fake, seed
        self.num_real = manifest.splits[split].images
        if min(self.num_real, num_fake) < 2:
            raise UserError(f"{self.name}: {self.num_real} real, {num_fake} generated pictures; needed are 2 of each")
        self.real: Gaussian | None = None  # statistics of the real pictures, on rank 0, once prepared

    def is_like(self, result: dict[str, Any]) -> bool:
        """Whether a result of another evaluator may be compared with this one's, given the same real pictures."""
        own = (self.name, self.extractor.weights_sha256, self.extractor.resize, self.seed)
        return own == tuple(result[key] for key in ("name", "weights_sha256", "resize", "seed"))

    def prepare(self) -> None:
        """Statistics of the real pictures, from the cache or by reading the split once. Afterwards a no-op.

        They depend on the pictures, the network and its resizing only, and rank 0 alone decides whether they are
        cached: else one rank could wait in a collective that another skips.
        """
        path = cached_statistics(self.manifest, [self.split], self.extractor) if rank() == 0 else None
        if path and self.real is None:
            self.real = recall_statistics(path)
        if broadcast(self.real is not None):
            return
        if rank() == 0:
            say(f"reading {self.num_real:,} real pictures for {self.name} (once, then cached)")
        moments = Moments(self.extractor.dim, self.extractor.device)
        # The loader draws a seed from torch's random state; a training must not depend on what is cached.
        with torch.random.fork_rng(devices=[]):
            for images in eval_images(
                self.manifest, self.split, rank=rank(), world_size=world_size(), batch_size=_BATCH
            ):
                moments.update(self.extractor(images))
        moments.all_reduce()
        # A few unusable pictures are passed over by each rank; together they may be too many.
        if moments.n < (1 - self.manifest.max_broken) * self.num_real:
            raise UserError(
                f"only {moments.n} of {self.num_real} {self.split} pictures of {self.manifest.root} can be used: "
                "`catdata verify` tells what is damaged"
            )
        if path:
            self.real = moments.gaussian()
            # Statistics with gaps may be those of a bad connection; the next training should try again.
            if moments.n == self.num_real:
                remember_statistics(path, self.real)

    def __call__(
        self, generate: Callable[[Sequence[int]], Tensor], see: Callable[[Tensor], object] | None = None
    ) -> dict[str, Any]:
        """The distance of ``generate`` from the real pictures; lower is better.

        Args:
            generate: makes the pictures of some seeds, uint8 ``[len(seeds), 3, H, W]``. Each seed is asked for once,
                by one of the ranks.
            see: is shown the features ``[n, dim]`` of each batch of this rank, in the order of the seeds, for measures
                that need more than their mean and covariance.

        Returns:
            On every rank the same: name, value, diversity (total variance of the features relative to that of the
            reals': near 0 when modes collapse), n_real, n_fake, extractor, weights_sha256, resize, seed, seconds.
        """
        began = time.perf_counter()
        moments = Moments(self.extractor.dim, self.extractor.device)
        start, stop = share(self.num_fake, rank(), world_size())
        for first in range(start, stop, _BATCH):
            seeds = range(self.seed + first, self.seed + min(first + _BATCH, stop))
            images = generate(seeds)
            assert len(images) == len(seeds), (len(images), len(seeds))
            features = self.extractor(images)
            moments.update(features)
            if see is not None:
                see(features)
        moments.all_reduce()
        assert moments.n == self.num_fake, (moments.n, self.num_fake)
        value = diversity = num_real = None
        if rank() == 0:
            assert self.real is not None, "prepare() first"
            fake = moments.gaussian()
            value, num_real = frechet_distance(self.real, fake), self.real.n
            diversity = float(np.trace(fake.cov) / np.trace(self.real.cov))
        return broadcast(
            {
                "name": self.name,
                "value": value,
                "diversity": diversity,
                "n_real": num_real,
                "n_fake": self.num_fake,
                "extractor": self.extractor.name,
                "weights_sha256": self.extractor.weights_sha256,
                "resize": self.extractor.resize,
                "seed": self.seed,
                "seconds": round(time.perf_counter() - began, 2),
            }
        )
