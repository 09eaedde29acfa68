"""Shared CLI conventions: exit codes, stdout JSON, errors.

Progress and messages go to stderr. When the work is done, one JSON object goes to stdout, or to stderr if the result
itself went to stdout. A user's mistake is one line on stderr and exit status 2; its traceback is shown with ``--debug``
only.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from catgan.text import printable, to_json

STDOUT = "-"
"""The value of an output option that stands for standard output, where a command supports that."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake of the user. The message says what was given, what is allowed and how to fix it."""


class Parser(argparse.ArgumentParser):
    """Raises ``UserError`` for mistakes, accepts no abbreviated options, and keeps the line breaks of its texts."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        import difflib  # on use: catinfer starts faster without

        start, _, rest = message.partition("unrecognized arguments: ")
        if not start and (near := difflib.get_close_matches(rest.split()[0], self._option_string_actions, 1)):
            message += f"; did you mean {near[0]}?"
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
    """``text`` without the query strings of the URLs in it, which can hold signatures and tokens."""
    return re.sub(r"(\w+://[^\s?'\"]+)\?[^\s'\",)]*", r"\1", text)


def say(message: str) -> None:
    """Print one line to stderr, if that is possible: without a reader, as after Ctrl-C in `... 2>&1 | tee`, on a full
    disk or a closed terminal, work goes on."""
    line = printable(without_queries(message))
    receive = _receivers.get(os.getpid())
    if receive is not None:
        receive(line)
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard(sys.stderr)
    except OSError:
        pass  # the next line may have room again


_receivers: dict[int, Callable[[str], object]] = {}  # by process: a forked one prints


@contextlib.contextmanager
def lines_to(receive: Callable[[str], object]) -> Iterator[None]:
    """Inside the block, hand the lines of ``say`` in this process to ``receive`` instead of printing them."""
    _receivers[os.getpid()] = receive
    try:
        yield
    finally:
        del _receivers[os.getpid()]


def _discard(stream: TextIO) -> None:
    """Discard what is written to a stream whose reader has ended; the interpreter would fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_stderr() -> None:
    """Give a process that was started without stderr (`2>&-`) one that discards. Otherwise messages would go to stdout,
    between the bytes of an image, and a file that is opened would become stderr."""
    if sys.stderr is not None:
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    if null != 2:
        os.close(null)
    sys.stderr = os.fdopen(2, "w", closefd=False)


def _print(result: dict[str, Any]) -> None:
    """Print the JSON object of a command. Raises BrokenPipeError and UserError."""
    stream = sys.stderr if result.get("out") == STDOUT else sys.stdout
    try:
        print(to_json(result), file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(stream)
        raise UserError(f"done, but the result cannot be written ({error.strerror})") from None


def _check_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted: cd to one that exists") from None


def run_command(name: str, main: Callable[[list[str]], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """Run ``main(argv)`` as the command ``name``, print its JSON object, and exit unless it succeeded.

    Exit status: 0 done, 1 stdout is closed, 2 a ``UserError`` or a file that cannot be used, 130 interrupted.
    ``--debug`` is allowed anywhere in ``argv`` and removed before ``main``.
    """
    _open_stderr()
    # By default Python searches all objects for garbage ten times while PyTorch and MLflow are imported, and at exit:
    # 3 of 20 seconds of a training of 1 kimg. Neither leaves garbage that matters.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        _check_working_directory()
        _print(main(args))
    except UserError as error:
        if debug:
            raise
        say(f"{name}: {' '.join(str(error).split())}")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of stdout has ended (`--help | head`)
        _discard(sys.stdout)
        raise SystemExit(1) from None
    except OSError as error:
        if debug or (error.filename is None and error.errno not in _FULL):
            raise
        file = "" if error.filename is None else f"{error.filename}: "
        say(f"{name}: {file}{error.strerror}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        say(f"{name}: interrupted")
        raise SystemExit(130) from None
