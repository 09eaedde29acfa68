"""What an order of ``catinfer`` shows: latents of seeds or from files, their move along directions, and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from catgan.command import UserError, say
from infer.classes import Class, labels_of
from infer.directions import read_directions, shift
from infer.latentfile import read_latent
from infer.latents import latents, walk
from infer.session import Generator


@dataclass(frozen=True)
class Points:
    """Latents that are computed when they are needed, since there can be a million of seeds.

    Attributes:
        names: of the images, for labels: seeds or the names of files.
        given: float32 ``[n, z_dim]``, instead of those of the seeds in ``names``.
        move: float32 ``[z_dim]``, along directions, see ``Generator``.
        classes: take turns, see ``infer.classes.class_of``; at most one if latents are given, none if the generator has
            none.
    """

    names: Sequence[int] | Sequence[str]
    given: np.ndarray | None
    move: np.ndarray
    classes: Sequence[Class] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, part: slice) -> Points:
        return replace(self, names=self.names[part], given=None if self.given is None else self.given[part])

    def latents(self) -> np.ndarray:
        """All of them, float32 ``[n, z_dim]``, before they are scaled and moved."""
        return latents([int(seed) for seed in self.names], len(self.move)) if self.given is None else self.given

    def labels(self) -> np.ndarray:
        """Of all of them, int64 ``[n]``."""
        seeds = self.names if self.given is None else range(len(self.names))
        return np.array(labels_of(map(int, seeds), self.classes), np.int64)

    def of(self, one: Class) -> Points:
        """The same latents, all in one class."""
        return replace(self, classes=(one,))

    def walk(self, steps: int) -> np.ndarray:
        """A closed walk through all of them, see ``infer.latents.walk``."""
        return walk(self.latents(), steps)


def open_points(
    generator: Generator,
    path: str,
    seeds: Sequence[int],
    files: Sequence[str],
    directions: Mapping[int, float],
    classes: Sequence[Class],
) -> Points:
    """The latents of ``seeds``, or those in ``files`` if there are any, their move along ``directions``, and their
    ``classes``.

    Warns of a latent that was made for other weights.

    Args:
        path: the generator's, for messages.
        directions: {number of a direction from 1 on: multiple}.

    Raises:
        UserError: a file is not a latent of this generator's size, or the generator lacks a direction.
    """
    move = np.zeros(generator.z_dim, np.float32)
    if directions:
        move = shift(read_directions(generator.metadata, generator.z_dim, path), directions, path)
    if not files:
        return Points(seeds, None, move, classes)
    given = [_read(file, generator, path) for file in files]
    return Points([Path(file).stem.removesuffix(".latent") for file in files], np.concatenate(given), move, classes)


def _read(file: str, generator: Generator, path: str) -> np.ndarray:
    latent = read_latent(Path(file))
    ours, theirs = generator.metadata.get("weights_sha256"), latent.weights_sha256
    if latent.z.shape[1] != generator.z_dim:
        raise UserError(
            f"--latent {file}: has {latent.z.shape[1]} values, but {path} needs {generator.z_dim}; it was made for "
            "another generator"
        )
    if ours and theirs and ours != theirs:
        say(f"warning: {file} was made for the weights {theirs[:12]}, {path} has {ours[:12]}: expect another image")
    return latent.z
