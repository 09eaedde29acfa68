"""The classes of a conditional model: those of its data set."""

from __future__ import annotations

from dataclasses import replace

from catgan.command import UserError
from catgan.dataset import Manifest
from catgan.text import printable
from trainer.data.open import DRAWN_CLASSES
from trainer.launch.options import Options

_MAX_CLASSES, _MAX_NAME = 1000, 100  # that readers of an exported file accept


def with_classes(options: Options, manifest: Manifest | None) -> Options:
    """``options`` with the names of the classes, if the model is conditional.

    Args:
        manifest: None for drawn cats, whose classes are the patterns of their coats.

    Raises:
        UserError: the data set has no classes, or too many; or ``--model.classes`` names others.
    """
    if not options.model.conditional:
        if options.model.classes:
            raise UserError("--model.classes without --model.conditional: leave it out, it follows from the data")
        return options
    names = DRAWN_CLASSES if manifest is None else _classes_of(manifest, options)
    if options.model.classes not in ((), names):
        raise UserError(
            f"--model.classes {' '.join(options.model.classes)}: leave it out, the classes follow from the data"
        )
    return replace(options, model=replace(options.model, classes=names))


def _classes_of(manifest: Manifest, options: Options) -> tuple[str, ...]:
    needs = f"{options.recipe} with --model.conditional needs images with classes, but --data {options.data}"
    if not manifest.labels:
        raise UserError(f"{needs} has none: build it with `catdata build --labels folder` or `--labels FILE.csv`")
    if not manifest.is_labelled:
        raise UserError(f"{needs} was built by an earlier version, which wrote no .cls files: build it again")
    if len(manifest.labels) > _MAX_CLASSES:
        found = f"{len(manifest.labels)} classes"
    elif long := [name for name in manifest.labels if len(name) > _MAX_NAME]:
        found = f"a name of {len(long[0])} characters"
    elif odd := [name for name in manifest.labels if not name.isprintable()]:
        found = f"the name {printable(odd[0])}, which is not printable"
    else:
        return manifest.labels
    raise UserError(
        f"--data {options.data} has {found}: allowed are {_MAX_CLASSES} classes with printable names of at most"
        f" {_MAX_NAME} characters; build it with other --labels"
    )
