"""What race.py measures of generated pictures; one pass of the judging network serves all of it."""

from __future__ import annotations

import itertools
import time

import torch
from race_training import Pictures
from torch import Tensor

from catgan.command import UserError, say
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images
from trainer.metrics.catfid.manifold import NEIGHBOURS, precision_recall
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.kernel import kernel_distance

MIN_NUM = NEIGHBOURS + 1
BATCH = 64


def choose_split(manifest: Manifest, wanted: str, num: int) -> str:
    """The split to judge by; stderr learns which and why.

    With fewer reals than fakes a Fréchet distance is mostly the bias of the reals' covariance, so "auto" takes the
    pictures that no training sees only if there are ``num`` of them.

    Raises:
        UserError: the split has too few pictures to measure anything.
    """
    images = {name: split.images for name, split in manifest.splits.items()}
    if wanted == "auto":
        split = "val" if images["val"] >= num else "train"
        why = f"the val split holds {images['val']:,}, --num is {num:,}"
    else:
        split, why = wanted, "as asked for"
    if images[split] < MIN_NUM:
        raise UserError(f"the {split} split holds {images[split]} pictures: at least {MIN_NUM} are needed to judge by")
    say(f"judged against the {images[split]:,} pictures of the {split} split ({why})")
    if images[split] < num:
        say(f"warning: fewer than --num {num:,} real pictures: all distances are biased upwards; kid is not")
    return split


class Judge:
    """Measures generators, each the same way.

    ``evaluations`` and ``seconds`` count what that took so far.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.evaluations, self.seconds = 0, 0.0
        self._real: Tensor | None = None

    def prepare(self) -> None:
        """Read the real pictures: all for the Fréchet distance (cached), as many as fakes for the rest."""
        self.evaluator.prepare()
        e = self.evaluator
        first = itertools.islice(eval_images(e.manifest, e.split, batch_size=BATCH), -(-e.num_fake // BATCH))
        self._real = torch.cat([e.extractor(images) for images in first])[: e.num_fake]

    def measure(self, pictures: Pictures) -> dict[str, float]:
        """distance, kid, precision and recall of ``pictures``."""
        assert self._real is not None, "prepare() first"
        began = time.perf_counter()
        features: list[Tensor] = []
        distance = self.evaluator(pictures, features.append)["value"]
        fake = torch.cat(features)
        precision, recall = precision_recall(self._real, fake)
        result = {
            "distance": round(distance, 2),
            "kid": round(kernel_distance(self._real, fake)[0], 5),
            "precision": round(precision, 4),
            "recall": round(recall, 4),
        }
        self._count(began)
        return result

    def distance(self, pictures: Pictures) -> float:
        """The distance alone."""
        began = time.perf_counter()
        value = round(self.evaluator(pictures)["value"], 2)
        self._count(began)
        return value

    def _count(self, began: float) -> None:
        self.evaluations += 1
        self.seconds += time.perf_counter() - began
