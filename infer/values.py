"""What may be asked of a generator: limits, and lists of seeds. For the command line, the service and ``inspect``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

MAX_N = 1_000_000
MAX_SEED = 2**32 - 1
MAX_PSI = 2.0
MAX_DIRECTION = 10.0  # standard deviations
DEFAULT_N = 16
RUNS = "out/runs"  # where trainings write
DEVICES = ("auto", "cpu", "cuda")


def parse_seeds(text: str, most: int = MAX_N) -> Sequence[int]:
    """An argument type: a list of numbers and ranges such as ``3,7-12`` that names each seed once, at most ``most``."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED:
            raise argparse.ArgumentTypeError(
                f"{text!r} is given, allowed are numbers from 0 to {MAX_SEED:,} and ranges of them, such as 3,7-12"
            )
        if len(found) + last - first + 1 > most:
            raise argparse.ArgumentTypeError(f"{text!r} are more than {most:,} seeds")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return found
