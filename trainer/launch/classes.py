"""The classes of a conditional model: those of its data set."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

from catgan.command import UserError
from catgan.dataset import Manifest
from infer.classes import parse_names
from trainer.config import Config
from trainer.data.open import DRAWN_CLASSES

AnyConfig = TypeVar("AnyConfig", bound=Config)


def with_classes(options: AnyConfig, manifest: Manifest | None) -> AnyConfig:
    """``options``, or a configuration, with the names of the classes, if the model is conditional.

    Args:
        manifest: None for drawn cats, whose classes are the patterns of their coats.

    Raises:
        UserError: the data set has no classes, or ones that an exported file cannot have; or ``--model.classes`` names
            others.
    """
    if not options.model.conditional:
        if options.model.classes:
            raise UserError("--model.classes without --model.conditional: leave it out, it follows from the data")
        return options
    names = DRAWN_CLASSES if manifest is None else _classes_of(manifest, options.recipe)
    if options.model.classes not in ((), names):
        raise UserError(
            f"--model.classes {' '.join(options.model.classes)}: leave it out, the classes follow from the data"
        )
    return replace(options, model=replace(options.model, classes=names))


def _classes_of(manifest: Manifest, recipe: str) -> tuple[str, ...]:
    needs = f"{recipe} with --model.conditional needs images with classes, but --data {manifest.root}"
    without = "or train without classes: --model.no-conditional"
    if not manifest.labels:
        raise UserError(
            f"{needs} has none: build it with `catdata build --labels folder` or `--labels FILE.csv`, {without}"
        )
    if not manifest.is_labelled:
        raise UserError(
            f"{needs} was built by an earlier version, which wrote no .cls files: build it again, {without}"
        )
    try:
        return parse_names(json.dumps(manifest.labels))  # as the readers of the exported file do
    except ValueError as error:
        raise UserError(
            f"--data {manifest.root} has classes that an exported file cannot have: {error}; build it with other"
            f" --labels, {without}"
        ) from None
