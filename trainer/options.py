"""The command line of ``trainer/run.py``: a recipe's name, then options that change its values."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from infer.command import UserError
from trainer.config import Config


@dataclass(frozen=True)
class Options(Config):
    """A configuration and what surrounds it."""

    recipe: tyro.conf.Suppress[str] = ""
    data: str | None = None
    """Folder of shards (see catdata); default: drawn cats."""
    out: str | None = None
    """Folder for runs; default: out/runs, in a Ray job ~/catgan/runs."""
    name: str | None = None
    """Name of the run; an existing one is continued. Default: recipe, time and a random tail."""
    workers: str | None = None
    """0: in this process, without Ray. N: that many workers of Ray Train. MIN:MAX: elastic. Default: one per GPU, else 1."""
    resume: str = "auto"
    """auto: continue the run of this name if it has a checkpoint. never: refuse to. PATH: start from that checkpoint."""
    dry_run: bool = False
    """Print the resolved configuration and what would happen, and touch nothing."""

    def config(self) -> Config:
        """The configuration alone."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


def split_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """A leading word without dashes is the recipe."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    return None, argv


def parse(argv: list[str], recipe: Config, description: str) -> Options:
    """``argv`` over ``recipe``'s values.

    Raises:
        UserError: one line with every unknown option and every unusable value.
    """
    if "-h" in argv or "--help" in argv:
        _cli(argv, recipe, description)
    try:
        return _quiet(argv, recipe)
    except UserError as first:
        # tyro stops at the first mistake; each option by itself shows the others.
        found = []
        for group in _groups(argv):
            try:
                _quiet(group, recipe)
            except UserError as error:
                found.append(str(error))
        raise UserError("; ".join(dict.fromkeys(found or [str(first)])) + "; --help lists the options") from None


def parse_workers(text: str) -> int | tuple[int, int]:
    """``N`` or ``MIN:MAX``.

    Raises:
        UserError: neither.
    """
    if re.fullmatch(r"\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        least, most = int(match[1]), int(match[2])
        if 1 <= least <= most:
            return least, most
    raise UserError(f"--workers {text}: give N, 0 or more, or MIN:MAX with 1 <= MIN <= MAX")


def _cli(argv: list[str], recipe: Config, description: str) -> Options:
    values: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(Config)}
    return tyro.cli(
        Options,
        prog="run.py [RECIPE]",
        description=description,
        args=argv,
        default=Options(**values),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _quiet(argv: list[str], recipe: Config) -> Options:
    """Parse; a mistake becomes a ``UserError`` with the first sentence of tyro's box."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return _cli(argv, recipe, "")
    except SystemExit:
        text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
        lines = [line.strip("│ ").strip() for line in text.splitlines()[1:]]
        body = list(_before_rule(lines))
        raise UserError(" ".join(body) or "unusable options") from None


def _before_rule(lines: list[str]):  # type: ignore[no-untyped-def]
    for line in lines:
        if line.startswith(("──", "╰")):
            return
        yield line


def _groups(argv: list[str]) -> list[list[str]]:
    """``argv`` cut before each option."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups
