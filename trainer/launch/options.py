"""The command line of ``trainer/run.py``: a recipe's name, then options that change its values."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
from dataclasses import dataclass, fields
from typing import Any

import tyro

from catgan.command import UserError
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
    """0: in this process, without Ray. N: so many workers of Ray Train. MIN:MAX: elastic. Default: GPUs, else 1."""
    resume: str = "auto"
    """auto: continue the run of this name if it has checkpoints. never: refuse to. PATH: begin a new run at that
    checkpoint."""
    init_from: str | None = None
    """Begin a new run with the weights of this run, checkpoint or .safetensors file: layers that fit, also across
    sizes."""
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


def value_of(argv: list[str], option: str) -> str | None:
    """The value given for ``option``; needed of ``--data`` before the rest can be parsed, since the size of the
    pictures may choose the recipe."""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


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
        found, names = [], _option_names(recipe)
        for group in _groups(argv):
            name = group[0].partition("=")[0].replace("_", "-")
            if name.startswith("--") and name not in names:
                found.append(f"there is no option {name}{_meant(name, names)}")
                continue
            try:
                _quiet(group, recipe)
            except UserError as error:
                found.append(str(error))
        raise UserError("; ".join(dict.fromkeys(found or [str(first)])) + "; --help lists the options") from None


def _option_names(recipe: Config) -> list[str]:
    """All options, as the help spells them: a switch that the recipe has on is called --no-..."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _cli(["--help"], recipe, "")
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", printed.getvalue())))


def _meant(name: str, names: list[str]) -> str:
    """Words that name the options that ``name`` may be a slip for: spelled like it, or with its last part."""
    if name == "--recipe":
        return " (the recipe is the first word, without dashes)"
    last = {option.rpartition(".")[2].lstrip("-"): option for option in names}
    near = difflib.get_close_matches(name, names, 2, 0.75)
    near += [last[part] for part in difflib.get_close_matches(name.rpartition(".")[2].lstrip("-"), last, 1, 0.85)]
    return f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""


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
        raise UserError(_first_paragraph(printed.getvalue())) from None


def _first_paragraph(box: str) -> str:
    """The sentence in one of tyro's boxes: what stands between its title and the next rule."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in text.splitlines()[1:]]
    is_rule = [not any(c.isalnum() for c in line) for line in lines]
    body = itertools.dropwhile(lambda pair: pair[1], zip(lines, is_rule, strict=True))
    return " ".join(line for line, _ in itertools.takewhile(lambda pair: not pair[1], body))


def _groups(argv: list[str]) -> list[list[str]]:
    """``argv`` cut before each option."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups
