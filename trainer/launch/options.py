"""The command line of ``trainer/run.py``: the name of a recipe, then options that change its values."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import tyro

from catgan.command import UserError
from trainer.config import Config, Schedule
from trainer.tracking.messages import redact

_MAX_DIFFERENCES = 4  # that a message names


@dataclass(frozen=True)
class Options(Config):
    """A configuration, and where and how to train with it."""

    recipe: tyro.conf.Suppress[str] = ""
    data: str | None = None
    """Folder of shards (see catdata); default: drawn cats."""
    out: str | None = None
    """Folder for runs; default: out/runs, in a Ray job ~/catgan/runs."""
    name: str | None = None
    """Name of the run; a run of this name is continued. Default: recipe, time and random digits."""
    workers: str | None = None
    """0: train in this process, without Ray. N: N Ray Train workers. MIN:MAX: elastic. Default: one per GPU, else 1."""
    resume: str = "auto"
    """auto: continue the run of this name if it has checkpoints. never: exit with an error if it has. PATH: start a new
    run from the checkpoint at PATH."""
    init_from: str | None = None
    """Initialise a new run with the weights of this run, checkpoint, .safetensors file or folder of both networks
    (catexport --weights). Layers that do not fit keep their random weights, so the sizes may differ."""
    dry_run: bool = False
    """Print the resolved configuration and the plan of the training, write nothing."""

    def config(self) -> Config:
        """The configuration alone."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


def split_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe's name, which is the first word unless that begins with a dash, and the remaining words."""
    if argv and not argv[0]:
        raise UserError("the first word, the name of the recipe, is empty; give one, or leave it out for the default")
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    return None, argv


def value_of(argv: list[str], option: str) -> str | None:
    """The value given for ``option``. Reads ``--data`` before the rest is parsed: the size of the images selects the
    recipe, and the recipe has the default values of all options."""
    found = None  # the last one counts, as in ``parse``
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word == option:
            found = following
        elif word.startswith(option + "="):
            found = word.partition("=")[2]
    return found


def asks_for_help(argv: list[str]) -> bool:
    """Whether ``parse`` prints something and exits."""
    return any(word in ("-h", "--help") or word.startswith("--tyro-") for word in argv)


def parse(argv: list[str], recipe: Config, description: str) -> Options:
    """Parse ``argv`` with the values of ``recipe`` as defaults. ``--help`` prints the help and exits.

    Raises:
        UserError: an unknown option or an unusable value, such as an empty one, which a variable that is not set gives.
    """
    cli = partial(
        tyro.cli,
        Options,
        prog="run.py [RECIPE]",
        description=description,
        args=_expand_constants(argv, recipe),
        default=Options(**{f.name: getattr(recipe, f.name) for f in fields(Config)}),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if asks_for_help(argv):  # prints and exits
        return cli()
    printed = io.StringIO()
    try:
        # Without a terminal, tyro draws its boxes as plain text: sections between rules of dashes.
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            options = cli()
    except SystemExit:
        title, message, *hints = re.split(r"\n *-{3,} *\n", printed.getvalue())
        similar = re.findall(r"^ {6}(--\S+)", "\n".join(hints), re.MULTILINE) if "Unrecognized" in title else []
        similar = list(dict.fromkeys(re.sub(r"\.(start|end|kimg)$", "", name) for name in similar))
        meant = f"; did you mean {' or '.join(similar)}?" if similar else ""
        if "--recipe" in message or re.search(r"Unrecognized options:\s*[^-\s]", message):
            meant = "; the recipe is the first word, without dashes"
        message = " ".join(message.split()).rstrip(".")
        message = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", message)
        raise UserError(f"{message}{meant}; --help lists the options") from None
    if empty := [name for name, value in values(options).items() if value == ""]:
        raise UserError(f"{', '.join(empty)}: the value is empty; give one, or leave the option out for its default")
    return options


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


def values(config: Config) -> dict[str, Any]:
    """The value of every option by its name, such as ``--optim.g-lr``; a schedule is one value."""

    def walk(group: object, prefix: str) -> Iterator[tuple[str, Any]]:
        for f in fields(group):  # type: ignore[arg-type]
            name, value = f"{prefix}{f.name.replace('_', '-')}", getattr(group, f.name)
            if is_dataclass(value) and not isinstance(value, Schedule):
                yield from walk(value, f"{name}.")
            else:
                yield name, value

    return dict(walk(config, "--"))


def texts(config: Config) -> dict[str, str]:
    """``values`` as text without passwords, to compare options of two programs: 2 and 2.0 are the same."""
    return {name: f"{v:.10g}" if isinstance(v, float) else redact(str(v)) for name, v in values(config).items()}


def differences(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first options that differ, as "--batch 16, now 32; --kimg 6, now 100; ..."; empty if none does."""
    was = {name: redact(text) for name, text in was.items()}
    changed = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    shown = "; ".join(f"{n} {was.get(n, 'none')}, now {now.get(n, 'none')}" for n in changed[:_MAX_DIFFERENCES])
    return shown + ("; ..." if len(changed) > _MAX_DIFFERENCES else "")


def schedules(config: Config) -> dict[str, Schedule]:
    """Every schedule of a configuration, by the name of its option."""
    return {name: value for name, value in values(config).items() if isinstance(value, Schedule)}


def _expand_constants(argv: list[str], recipe: Config) -> list[str]:
    """Replace a schedule given as one number, ``--optim.g-lr 1e-4``, by its ``.start``, ``.end`` and ``.kimg``."""
    names = schedules(recipe)
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in names:
            value = value if equals else next(words, "")
            try:
                float(value)
            except ValueError:
                raise UserError(f"{name} {value}: give one number, or {name}.start, .end and .kimg") from None
            expanded += [f"{name}.start={value}", f"{name}.end={value}", f"{name}.kimg=0"]
        else:
            expanded.append(word)
    return expanded
