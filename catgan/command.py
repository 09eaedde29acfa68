"""The manners every command of this project shares.

Progress and messages for people go to stderr, one JSON object goes to stdout when the work is done,
and a user's mistake is one clear line with exit status 2 (a traceback only under ``--debug``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake of the user's: the message says what was given, what is allowed and what to do."""


class Parser(argparse.ArgumentParser):
    """Its errors are ``UserError``, options cannot be abbreviated, and its texts keep their line breaks."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows what is allowed)")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """An argument type: a value of ``kind`` with low <= value <= high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            word = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a {word} from {low:,} to {high:,}")
        return value

    return parse


def dispatch(
    name: str, overview: str, commands: Mapping[str, Callable[[list[str]], dict[str, Any]]], argv: list[str]
) -> dict[str, Any]:
    """Run the sub-command that ``argv`` begins with. Returns its JSON object."""
    parser = Parser(name, overview)
    parser.add_argument("command", choices=commands, help=argparse.SUPPRESS)
    parser.usage = f"{name} {{{','.join(commands)}}} ..."
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


def without_queries(text: str) -> str:
    """``text`` without what follows the ``?`` of the URLs in it: signatures and tokens stand there."""
    return re.sub(r"(\w+://[^\s?'\"]+)\?[^\s'\",)]*", r"\1", text)


def say(message: str) -> None:
    """Print one line for people (stderr)."""
    print(without_queries(message), file=sys.stderr, flush=True)


def run_command(name: str, main: Callable[[list[str]], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """Run ``main(argv)`` as the command ``name`` and leave the process.

    ``main`` returns the JSON object for stdout. Exit status: 0 done, 2 a ``UserError``, 130 interrupted.
    ``--debug`` may stand anywhere in ``argv``; it is removed before ``main`` sees the rest.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        result = main(args)
    except UserError as error:
        if debug:
            raise
        say(f"{name}: {' '.join(str(error).split())}")
        raise SystemExit(2) from None
    except BrokenPipeError:
        # Whoever read our output has seen enough (`--help | head`); the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    print(json.dumps(result), flush=True)
