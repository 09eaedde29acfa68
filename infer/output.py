"""Where ``catinfer`` writes images: one sheet, one array, single files or a data set."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catgan.command import STDOUT, UserError
from infer.files import ARRAY, STATE, SUFFIXES


@dataclass(frozen=True)
class Sheet:
    """All images in one image file.

    Attributes:
        out: its path, or ``STDOUT``.
        suffix: of its format, such as ".png".
        labels: whether the seeds are written below the images.
        sweep: values of psi, one row of the same seeds for each; empty for a square of images with the order's psi.
    """

    out: str
    suffix: str
    labels: bool = False
    sweep: Sequence[float] = ()


@dataclass(frozen=True)
class Array:
    """All images in one ``.npy`` file, uint8 ``[n, size, size, 3]``; ``out`` is its path, or ``STDOUT``."""

    out: str


@dataclass(frozen=True)
class Files:
    """One file per image in the folder ``out``, named by seed, with ``suffix`` such as ".png"."""

    out: str
    suffix: str = ".png"


@dataclass(frozen=True)
class Shards:
    """A WebDataset in the folder ``out``."""

    out: str


Output = Sheet | Array | Files | Shards


def parse_output(
    out: str | None,
    suffix: str | None = None,
    shards: bool = False,
    labels: bool = False,
    sweep: Sequence[float] = (),
) -> Output | None:
    """The output that ``--out`` and the options of its kinds describe; None without ``--out``.

    Raises:
        UserError: the name fits no kind, or an option does not apply to its kind.
    """
    to_stdout = out == STDOUT
    try:
        is_file = to_stdout or (out is not None and _is_one_file(out))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    is_folder = out is not None and not is_file
    kind = (suffix or ".png") if to_stdout else Path(out or "").suffix.lower()
    is_sheet = is_file and kind != ARRAY
    for is_given, applies, problem in (
        (suffix is not None, is_folder or to_stdout, "--format needs --out DIR/ or --out -"),
        (shards, is_folder, "--shards needs --out DIR/"),
        (shards, suffix in (None, ".png"), "--shards are always PNG: omit --format"),
        (labels, is_sheet, "--labels needs a sheet, such as --out cats.png"),
        (bool(sweep), is_sheet, "--truncation-sweep needs a sheet, such as --out cats.png"),
    ):
        if is_given and not applies:
            raise UserError(problem + (f"; --out is {out}" if out else ""))
    if to_stdout and (sys.stdout is None or sys.stdout.isatty()):
        raise UserError(
            "--out -: standard output is a terminal or closed; redirect it, as in `catinfer ... > cats.png`"
        )
    if out is None:
        return None
    if is_sheet:
        return Sheet(out, kind, labels, sweep)
    if is_file:
        return Array(out)
    return Shards(out) if shards else Files(out, suffix or ".png")


def _is_one_file(out: str) -> bool:
    """Whether ``out`` names one file for all images rather than a folder. Raises ``UserError`` if it fits neither."""
    path, ends_with_slash = Path(out), out.endswith(("/", os.sep))
    wanted = (
        "one sheet ends with .png, .jpg, .jpeg or .webp, one array with .npy; "
        "for single files name a directory, ending with /"
    )
    if not out:
        raise UserError(f"--out is empty: {wanted}")
    if path.is_dir() and path.suffix.lower() in SUFFIXES and not ends_with_slash:
        raise UserError(f"--out {out}: is a directory; add / for single files in it, or choose another name")
    if path.is_dir() or ends_with_slash:
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix or path.exists():
        raise UserError(f"--out {out}: {wanted}")
    return False


def check_shards(folder: Path) -> None:
    """Raise ``UserError`` unless ``folder`` is missing, empty, or holds unfinished work. Raises OSError."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file():
        raise UserError(f"--out {folder}: is not empty; shards need a folder of their own")
