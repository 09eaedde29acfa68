"""The training images nearest to generated ones, to see whether a generator copies them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catgan.command import UserError, say
from catgan.dataset import Manifest
from infer.grid import to_uint8
from infer.latents import latents
from trainer.checkpoints import checkpoint
from trainer.config import Config
from trainer.data.open import open_data
from trainer.data.stream import eval_images
from trainer.features.extractors import Extractor, choose_extractor
from trainer.metrics.catfid.manifold import nearest
from trainer.report.history import History
from trainer.report.markup import pixels_url, section, text

NUM_QUERIES = 256
"""Generated images, and at most as many held-out ones, whose nearest training images are searched."""
NUM_SHOWN = 8
NUM_NEAREST = 3

_BATCH = 64
_LONGEST = 256  # pixels of an image in the file


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of generated ones, by Euclidean distance in feature space."""

    seeds: list[int]
    """Of the generated images that are nearest to a training image, the nearest first."""
    images: list[list[Image.Image]]
    """For each of these the generated image and its nearest training images, the nearest first."""
    distances: list[list[float]]
    """To these training images."""
    generated: float
    """Median distance of all generated images to their nearest training image."""
    held_out: float | None
    """The same of images of the val split; None if there is none."""
    num_held_out: int
    network: str


def neighbours_section(run: History) -> str:
    """The section with the training images nearest to generated ones. Computes the features of all training images.

    Raises:
        UserError: the run has no best generator yet, its data set is gone or changed, or its metric network is missing.
    """
    found = find_neighbours(*_open(run))
    median = f"The median distance to the nearest training image is {found.generated:.3g} for the generated images"
    if found.held_out is None:
        reading = f"{median}. The data set has no val split to compare it with."
    else:
        reading = (
            f"{median}, and {found.held_out:.3g} for {found.num_held_out} real images of the val split, which are not"
            " trained on. If the first is much smaller, the generator copies training images; if it is larger, its"
            " images are unlike real ones."
        )
    say(reading)
    rows = "".join(
        f'<div class="neighbours">{_figure(images[0], f"seed {seed}", f"Generated image of seed {seed}")}'
        + "".join(
            _figure(image, f"{distance:.3g}", f"Training image at distance {distance:.3g}")
            for image, distance in zip(images[1:], distances, strict=True)
        )
        + "</div>"
        for seed, images, distances in zip(found.seeds, found.images, found.distances, strict=True)
    )
    return section(
        "Nearest training images",
        f"<p>{text(reading)}</p>"
        f'<p class="hint">Distances in the features of {text(found.network)}. Shown are those of the seeds 0 to'
        f" {NUM_QUERIES - 1} that are nearest to a training image, each followed by its {NUM_NEAREST} nearest training"
        " images with their distances. <strong>This file therefore contains images of the data set.</strong></p>"
        f'<div class="neighbour-rows">{rows}</div>',
    )


def _figure(image: Image.Image, caption: str, alt: str) -> str:
    url = pixels_url(image, _LONGEST)
    return f'<figure><img alt="{text(alt)}" src="{url}"><figcaption>{text(caption)}</figcaption></figure>'


def _open(run: History) -> tuple[Any, Manifest, Extractor]:
    """The best generator, the data set and the metric network of a run."""
    best = run.folder / "best"
    if not checkpoint.holds_weights(best):
        raise UserError(f"--neighbours: {run.folder} has no best generator yet; wait for its first evaluation")
    generator, info = checkpoint.load_generator(best)
    config = Config.from_dict(info["config"])
    manifest = open_data(run.config.get("data"), config.model.size, config.loader, config.model.conditional)
    if manifest.digest != info["dataset_digest"]:
        raise UserError(
            f"--neighbours: the data set at {manifest.root} is not the one that {run.folder} was trained on: put that"
            " back, or leave --neighbours out"
        )
    network = info["metric"]["extractor"].partition("-")[0]  # a hash follows for other weights
    weights = config.eval.weights if network == "inception" else None
    return generator, manifest, choose_extractor(network, weights)


def find_neighbours(generator: Any, manifest: Manifest, extractor: Extractor) -> Neighbours:
    """The nearest training images of the images of the seeds 0 to ``NUM_QUERIES - 1``; reads the train split once.

    Args:
        generator: a module ``[n, z_dim]`` -> ``[n, 3, size, size]`` in [-1, 1], in evaluation mode on the CPU.
    """
    fakes = torch.cat([_generate(generator, seeds) for seeds in _chunks(NUM_QUERIES)])
    held_out = list(itertools.islice(eval_images(manifest, "val", batch_size=_BATCH), NUM_QUERIES // _BATCH))
    points = torch.cat([extractor(images) for images in (*fakes.split(_BATCH), *held_out)])
    say(f"--neighbours: computing the features of {manifest.splits['train'].images:,} training images")
    squares, which, kept = _search(points, extractor, eval_images(manifest, "train", batch_size=_BATCH), len(fakes))
    distances = squares.sqrt()
    nearest_first = distances[: len(fakes), 0].argsort(stable=True)[:NUM_SHOWN].tolist()
    return Neighbours(
        seeds=nearest_first,
        images=[[_image(x) for x in (fakes[i], *(kept[j] for j in which[i].tolist()))] for i in nearest_first],
        distances=[distances[i].tolist() for i in nearest_first],
        generated=distances[: len(fakes), 0].median().item(),
        held_out=distances[len(fakes) :, 0].median().item() if held_out else None,
        num_held_out=len(points) - len(fakes),
        network=extractor.name,
    )


def _search(
    points: Tensor, extractor: Extractor, batches: Iterable[Tensor], num_kept: int
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The nearest of the images in ``batches`` for each of the features ``points [m, d]``: squared distances
    and indices ``[m, NUM_NEAREST]``, and by their indices the images near the first ``num_kept`` points. Memory does
    not grow with the number of images."""
    squares = torch.empty(len(points), 0, dtype=torch.float64, device=points.device)
    which = torch.empty(len(points), 0, dtype=torch.int64, device=points.device)
    kept: dict[int, Tensor] = {}
    first = 0
    for images in batches:
        near, here = nearest(points, extractor(images), min(NUM_NEAREST, len(images)))
        squares = torch.cat([squares, near], 1)
        squares, picked = squares.topk(min(NUM_NEAREST, squares.shape[1]), 1, largest=False)
        which = torch.cat([which, here + first], 1).gather(1, picked)
        wanted = set(which[:num_kept].flatten().tolist())
        kept = {i: image for i, image in kept.items() if i in wanted}
        kept |= {i: images[i - first].clone() for i in wanted if i >= first}
        first += len(images)
    return squares, which, kept


def _chunks(count: int) -> Iterable[range]:
    return (range(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH))


@torch.no_grad()
def _generate(generator: Any, seeds: range) -> Tensor:
    num_classes = len(getattr(generator, "classes", ()))
    label = {"label": torch.tensor(seeds) % num_classes} if num_classes else {}  # all classes in turn
    images = generator(torch.from_numpy(latents(seeds, generator.z_dim)), **label)
    return torch.from_numpy(to_uint8(images.numpy())).permute(0, 3, 1, 2)


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
