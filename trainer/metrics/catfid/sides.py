"""The two sides of a comparison: a folder of images, a data set, gen.onnx, or an .npz of statistics."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from catgan.command import UserError, say
from catgan.dataset import MANIFEST, Manifest
from catgan.location import is_url, local_path, resolved_path
from catgan.outputs import RUN, in_words, own_files, owner
from infer.latents import latents
from infer.session import Generator
from trainer.data.images import ImageError, decode
from trainer.data.reasons import reason_of
from trainer.data.stream import eval_images
from trainer.features.extractors import DISCRIMINATOR_NETWORK
from trainer.features.networks import EFFLITE0, OPENNSFW
from trainer.metrics import classes
from trainer.metrics.frechet import Gaussian

BATCH = 64

T = TypeVar("T")

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size; ``batches()`` reads or generates them: uint8 ``[<=64, 3, height, width]``."""

    kind: Literal["folder", "shards", "onnx"]
    count: int
    size: tuple[int, int]
    """Height and width in pixels."""
    batches: Callable[[], Iterator[Tensor]]
    shards: tuple[Manifest, list[str]] | None = None
    """For kind "shards": the data set and the names of its splits."""
    generator: Generator | None = None
    """For kind "onnx"."""


Side = ImageSet | Gaussian


def open_side(location: str, *, split: str | None, num: int, seed: int) -> Side:
    """Open one side; only headers are read.

    Args:
        location: a folder of images (searched recursively), a folder or URL of shards, gen.onnx, or an .npz of
            statistics.
        split: of shards; None for all splits.
        num, seed: gen.onnx generates the images of the seeds ``seed`` to ``seed + num - 1``.

    Raises:
        UserError: it does not exist, is empty, or is none of these.
    """
    if is_url(location):
        return _shards(str(location), split)
    path = local_path(location)
    if not path.exists():
        raise UserError(f"{location} does not exist: give a folder of images or shards, an .npz file or gen.onnx")
    if path.is_dir():
        return _shards(path, split) if (path / MANIFEST).is_file() else _folder(path)
    if path.suffix == ".onnx":
        return _generated(path, num, seed)
    if path.suffix == ".npz":
        return Gaussian.load(path)
    raise UserError(f"{location} is none of: folder of images or shards, .npz statistics, .onnx generator")


def is_trained_on_efflite0(side: Side) -> bool:
    """Whether a discriminator saw the features of EfficientNet-Lite0 when this generator was trained. Files of earlier
    versions do not say it, but were evaluated by the other network then."""
    if not isinstance(side, ImageSet) or side.generator is None:
        return False
    entries = side.generator.metadata
    known = entries.get(DISCRIMINATOR_NETWORK)
    return known == EFFLITE0.name or (known is None and entries.get("metric", "").endswith(f"_{OPENNSFW.name}"))


def num_images(side: Side) -> int | None:
    """The number of images; None for statistics that do not contain it."""
    return side.count if isinstance(side, ImageSet) else side.n


def _shards(location: str | Path, split: str | None) -> ImageSet:
    manifest = Manifest.load(location)
    splits = list(manifest.splits) if split is None else [split]
    count = sum(manifest.splits[name].images for name in splits)
    if not count:
        raise UserError(f"{location} has no images in its split {split}: choose another --split")

    def batches() -> Iterator[Tensor]:
        return itertools.chain.from_iterable(eval_images(manifest, name, batch_size=BATCH) for name in splits)

    return ImageSet("shards", count, (manifest.size, manifest.size), batches, shards=(manifest, splits))


def _generated(path: Path, num: int, seed: int) -> ImageSet:
    generator = Generator(path, "auto")

    def batches() -> Iterator[Tensor]:
        for seeds in _chunks(range(seed, seed + num)):
            label = classes.as_trained(generator, seeds)
            yield torch.from_numpy(generator(latents(seeds, generator.z_dim), label=label)).permute(0, 3, 1, 2)

    return ImageSet("onnx", num, (generator.size, generator.size), batches, generator=generator)


def generator_of_run(location: str) -> str:
    """The best generator of the training run in the folder ``location``, or whose folder ``best`` it is; ``location``
    itself if it is neither.

    Raises:
        UserError: the run has no gen.onnx.
    """
    if is_url(location) or not (path := local_path(location)).is_dir():
        return location
    if RUN in own_files([entry.name for entry in path.iterdir()]).values():
        run, onnx = path, path / "best" / "gen.onnx"
    elif (found := owner(resolved_path(path))) and path.name == "best":
        run, onnx = found[0], path / "gen.onnx"
    else:
        return location
    if not onnx.is_file():
        raise UserError(f"{run} is a training run without best/gen.onnx: `catexport {run} -o gen.onnx`, then give that")
    say(f"{run} is a training run: taking its best generator, {onnx}")
    return str(onnx)


def _folder(path: Path) -> ImageSet:
    if found := owner(resolved_path(path)):
        folder, kind = found
        raise UserError(f"{path} is part of the {kind} in {folder}, and has no single images: give {folder}")
    own: dict[str, str] = {}
    files = sorted(file for file in _files(path, own) if file.suffix.lower() in _SUFFIXES and file.is_file())
    if own:
        say(f"{path}: skipped, since they are no single images, the files of {in_words(own)}")
    if not files:
        raise UserError(f"{path} has no images ({' '.join(_SUFFIXES)}) and no {MANIFEST}")
    size = _read(files[0]).shape[:2]

    def batches() -> Iterator[Tensor]:
        for chunk in _chunks(files):
            images = [_read(file) for file in chunk]
            for file, image in zip(chunk, images, strict=True):
                if image.shape[:2] != size:
                    raise UserError(
                        f"{file} is {width_x_height(image.shape[:2])}, {files[0].name} is {width_x_height(size)}: all "
                        "images of a side must have the same size (catdata build resizes them)"
                    )
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return ImageSet("folder", len(files), size, batches)


def _files(folder: Path, own: dict[str, str]) -> Iterator[Path]:
    """The files below ``folder`` that are neither hidden nor written by this project's commands.

    Args:
        own: gets the folders in which files were skipped, with their kind.
    """
    for here, folders, names in os.walk(folder):
        found = own_files([*folders, *names])
        own.update((here, kind) for kind in found.values())
        folders[:] = [name for name in folders if name not in found]
        yield from (Path(here, name) for name in names if name not in found and not name.startswith("."))


def _read(file: Path) -> np.ndarray:
    try:
        return np.asarray(decode(file.read_bytes()))
    except (ImageError, OSError) as error:
        raise UserError(f"{file} cannot be read as an image ({reason_of(error)}): remove it") from None


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[first : first + BATCH] for first in range(0, len(items), BATCH))


def width_x_height(size: tuple[int, int]) -> str:
    """A size (height, width) for people, such as "64x48"."""
    return f"{size[1]}x{size[0]}"
