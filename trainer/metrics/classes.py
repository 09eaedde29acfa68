"""Labels for the images of a conditional ONNX file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from catgan.dataset import Split
from infer.session import Generator

ENTRY, COUNTS = "classes", "class_counts"
"""Entries of the metadata: the names of the classes by label, and the numbers of training images of each, JSON."""


def names(generator: Generator) -> list[str]:
    """The names of the classes by label; none if the generator is not conditional."""
    found: list[str] = json.loads(generator.metadata.get(ENTRY, "[]"))
    return found


def in_turn(generator: Generator, count: int) -> dict[str, Any]:
    """The keyword of ``Generator.__call__`` with all classes in turn; empty if there are none."""
    return as_keyword(generator, np.arange(count) % max(len(names(generator)), 1))


def as_trained(generator: Generator, seeds: Sequence[int], split: Split | None = None) -> dict[str, Any]:
    """The keyword of ``Generator.__call__`` with classes as frequent as in ``split``, or else as in the training."""
    if split is None:
        counts = json.loads(generator.metadata.get(COUNTS, "null")) or [1] * len(names(generator))
        split = Split((), tuple(counts))
    return as_keyword(generator, split.labels_of(seeds) if split.class_counts else [0] * len(seeds))


def as_keyword(generator: Generator, labels: Sequence[int] | np.ndarray) -> dict[str, Any]:
    return {"label": np.asarray(labels, np.int64)} if names(generator) else {}
