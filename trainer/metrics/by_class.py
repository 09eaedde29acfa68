"""The Fréchet distance of each class alone, from the features that an evaluation has computed anyway."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from catgan.dataset import Manifest
from trainer.data.stream import eval_batches
from trainer.distributed.collectives import gather, rank, world_size
from trainer.features.extractors import Extractor
from trainer.metrics.evaluate import metric_name

MIN_IMAGES = 100
"""Real and generated images of a class from which on its distance is computed."""
MAX_REALS = 500
"""Real images of a class that are used, the first ones of the split: a distance takes the singular values of a matrix
of them."""

_BATCH = 64


class ByClass:
    """Distances by class of the features of generated images, on rank 0. Making it is a collective: all ranks read the
    real images.

    Args:
        labels: of the generated images, in the order of their features.
    """

    def __init__(self, manifest: Manifest, extractor: Extractor, labels: Sequence[int], split: str = "train") -> None:
        self.labels = torch.tensor(labels)
        fakes, reals = self.labels.bincount(minlength=len(manifest.labels)), manifest.splits[split].class_counts
        chosen = [i for i, count in enumerate(reals) if min(count, int(fakes[i])) >= MIN_IMAGES]
        first = _first_features(manifest, extractor, split, chosen)
        counts = gather({i: len(features) for i, features in first.items()})
        found = gather(_wanted(first, counts[: rank()]))  # no more than MAX_REALS of a class travel
        self.reals = {i: torch.cat([part[i] for part in found]) for i in chosen} if rank() == 0 else {}
        slugs = _slugs(manifest.labels)
        self.names = {
            i: f"class/{slugs[i]}/{metric_name('fid', extractor.name, int(fakes[i]), force=True)}" for i in chosen
        }

    def __call__(self, features: Tensor) -> dict[str, float]:
        """The distances of ``features`` ``[n, d]`` by name, such as "class/tabby/fd463_efflite0"."""
        rows = features.cpu()
        return {self.names[i]: distance(reals, rows[self.labels == i]) for i, reals in self.reals.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance between normal distributions with the means and covariances of features ``[n, d]`` and
    ``[m, d]``, n and m at least 2, for fewer images than dimensions.

    With A, B the features less their mean, over sqrt(n - 1), the trace of ``(A^T A B^T B)^(1/2)`` is the sum of the
    singular values of ``A B^T`` ``[n, m]``.
    """
    a, b = a.double(), b.double()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    traces = sum(x.square().sum() for x in centred)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + traces - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum())


def _first_features(manifest: Manifest, extractor: Extractor, split: str, chosen: Sequence[int]) -> dict[int, Tensor]:
    """This rank's first features of each class, up to ``MAX_REALS``, on the CPU: a rank's images follow those of the
    one before, so that the first ones of all ranks together are those of the split, for any number of ranks."""
    left = dict.fromkeys(chosen, MAX_REALS)
    found: dict[int, list[Tensor]] = {i: [torch.empty(0, extractor.dim)] for i in chosen}
    for images, labels in eval_batches(manifest, split, rank(), world_size(), _BATCH, labelled=True):
        if not any(left.values()):
            break
        wanted = []
        for row, label in enumerate(labels.tolist()):
            if left.get(label, 0):
                left[label] -= 1
                wanted.append(row)
        if wanted:
            for feature, label in zip(extractor(images[wanted]).cpu(), labels[wanted].tolist(), strict=True):
                found[label].append(feature[None].float())
    return {i: torch.cat(parts) for i, parts in found.items()}


def _wanted(features: dict[int, Tensor], before: Sequence[dict[int, int]]) -> dict[int, Tensor]:
    """The first rows of each class, as many as ranks with the numbers ``before`` leave of ``MAX_REALS``."""
    return {i: rows[: max(MAX_REALS - sum(counts[i] for counts in before), 0)] for i, rows in features.items()}


def _slugs(names: Sequence[str]) -> list[str]:
    """The names as MLflow's metrics may have them; those that would be equal are followed by their number."""
    slugs = [re.sub(r"[^\w .-]", "_", name, flags=re.ASCII).strip() or "_" for name in names]
    counts = Counter(slugs)
    while repeated := {slug for slug, count in counts.items() if count > 1}:
        slugs = [f"{slug}-{i}" if slug in repeated else slug for i, slug in enumerate(slugs)]
        counts = Counter(slugs)  # a name may end like a number that was added
    return slugs
