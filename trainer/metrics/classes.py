"""Which classes the images of a conditional ONNX file get in an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from catgan.dataset import Split
from infer.session import Generator

COUNTS = "class_counts"
"""Entry of the metadata: the numbers of training images of each class, JSON."""


def in_turn(generator: Generator, count: int, first: int = 0) -> np.ndarray:
    """Labels int64 ``[count]`` of images ``first``, ``first + 1``...: all classes in turn, zeros if there are none."""
    return np.arange(first, first + count) % max(len(generator.classes), 1)


def as_trained(generator: Generator, seeds: Sequence[int], split: Split | None = None) -> np.ndarray:
    """Labels int64 ``[n]`` with classes as frequent as in ``split``, or else as in the training; zeros if there are
    none."""
    if not generator.classes:
        return np.zeros(len(seeds), np.int64)
    split = split or Split((), _recorded_counts(generator))
    return np.array(split.labels_of(seeds) if split.class_counts else [0] * len(seeds), np.int64)


def _recorded_counts(generator: Generator) -> tuple[int, ...]:
    """The counts in the metadata, which may be anything; equal ones unless they fit the classes."""
    try:
        counts = json.loads(generator.metadata.get(COUNTS, ""))
    except (ValueError, RecursionError):
        counts = None
    fits = isinstance(counts, list) and len(counts) == len(generator.classes)
    if fits and all(type(count) is int and 0 <= count < 2**40 for count in counts) and any(counts):
        return tuple(counts)
    return (1,) * len(generator.classes)
