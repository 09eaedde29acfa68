"""The values that a sweep tries: ``--try FIELD=SPACE``, where a field is an option of ``run.py`` without its dashes."""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from catgan.command import UserError
from trainer.config import Config, Schedule
from trainer.launch.options import values

Value = str
"""A value as on the command line: what is written down, printed and parsed again is the same."""

# What one trial cannot have otherwise than the others.
_FIXED = {
    "kimg": "trials are compared at equal kimg; give --kimg for all of them",
    "seed": "the best configurations are repeated with other seeds by --confirm",
    "recipe": "the recipe is the first word, the same for all trials",
}
_FIXED_GROUPS = {
    "eval": "trials are compared by one metric; give it for all of them",
    "track": "it does not change a training; give it for all of them",
}
_MAX_FINITE = 100_000  # combinations that are listed
_MAX_DRAWS = 100  # per trial, until one differs from those before


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    field: str
    options: tuple[Value, ...]

    def draw(self, rng: random.Random) -> Value:
        return rng.choice(self.options)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that show whether all can be used."""
        return self.options

    def __str__(self) -> str:
        return f"{self.field}={','.join(self.options)}"


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, uniformly or uniformly in the logarithm."""

    field: str
    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, rng: random.Random) -> Value:
        if self.is_log:
            return self.text(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.text(
            rng.randint(int(self.low), int(self.high)) if self.is_whole else rng.uniform(self.low, self.high)
        )

    def text(self, number: float) -> Value:
        """A number as a value: four digits are enough to try, and are short to read. Never outside the range."""
        number = min(max(float(f"{number:.4g}"), self.low), self.high)
        return str(round(number)) if self.is_whole else f"{number:g}"

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.text(self.low), self.text(self.high)

    def __str__(self) -> str:
        return f"{self.field}={'log:' if self.is_log else ''}{self.text(self.low)}..{self.text(self.high)}"


Dimension = Choice | Range


def parse_space(texts: Sequence[str], config: Config) -> list[Dimension]:
    """The dimensions that ``--try`` gives.

    Args:
        texts: ``FIELD=a,b,c``, ``FIELD=lo..hi`` or ``FIELD=log:lo..hi``.
        config: of the recipe, whose fields and their types are meant.

    Raises:
        UserError: no such field, or one that cannot differ between trials, or an unusable space.
    """
    if not texts:
        raise UserError("nothing to try; give --try FIELD=a,b,c or FIELD=lo..hi at least once, as --try batch=16,32")
    dimensions = [_parse(text, config) for text in texts]
    fields = [dimension.field for dimension in dimensions]
    if doubled := {field for field in fields if fields.count(field) > 1}:
        raise UserError(f"--try {min(doubled)}: given twice; give all its values at once")
    for field, other in itertools.permutations(fields, 2):
        if other.startswith(f"{field}."):
            raise UserError(f"--try {field} and --try {other}: the first sets the second; leave one of them out")
    return dimensions


def _parse(text: str, config: Config) -> Dimension:
    field, equals, space = (part.strip() for part in text.partition("="))
    field = field.removeprefix("--").replace("_", "-")
    given = f"--try {text}"
    if not equals or not space:
        raise UserError(f"{given}: give FIELD=a,b,c, FIELD=lo..hi or FIELD=log:lo..hi")
    default = _default(field, config, given)
    if ".." not in space:
        if space.startswith("log:"):
            raise UserError(f"{given}: log: needs a range, {field}=log:lo..hi")
        options = tuple(option.strip() for option in space.split(","))
        if "" in options or len(set(options)) < len(options):
            raise UserError(f"{given}: a value is empty or given twice")
        return Choice(field, options)
    if isinstance(default, bool) or not isinstance(default, int | float | Schedule):
        raise UserError(f"{given}: {field} is not a number; list its values, as {field}=a,b")
    is_log, space = space.startswith("log:"), space.removeprefix("log:")
    try:
        low, high = (float(number) for number in space.split(".."))
    except ValueError:
        raise UserError(f"{given}: {space} is not a range of numbers; give lo..hi, as 0.1..2") from None
    is_whole = isinstance(default, int)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{given}: the first number must be less than the second, and both finite")
    if is_log and low <= 0:
        raise UserError(f"{given}: a logarithmic range begins above 0")
    if is_whole and (low != int(low) or high != int(high)):
        raise UserError(f"{given}: {field} is a whole number; give whole limits")
    return Range(field, low, high, is_log, is_whole)


def _default(field: str, config: Config, given: str) -> object:
    """The recipe's value of ``field``."""
    known = {name.removeprefix("--"): value for name, value in values(config).items()}
    for name, value in list(known.items()):
        if isinstance(value, Schedule):
            known |= {f"{name}.{part}": getattr(value, part) for part in ("start", "end", "kimg")}
    reason = _FIXED.get(field) or _FIXED_GROUPS.get(field.partition(".")[0])
    if reason:
        raise UserError(f"{given}: {reason}")
    if field not in known:
        near = difflib.get_close_matches(field, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{given}: no field {field!r}{meant}; `run.py --help` lists the options, without their dashes")
    return known[field]


def words(chosen: Mapping[str, Value], config: Config) -> list[str]:
    """The options of ``run.py`` that set these values.

    Raises:
        UserError: a flag that is neither true nor false.
    """
    result: list[str] = []
    for field, value in chosen.items():
        if isinstance(default := _default(field, config, f"--try {field}={value}"), bool):
            if value.lower() not in ("true", "false"):
                raise UserError(f"--try {field}={value}: give true, false or both")
            if (value.lower() == "true") != default:
                group, _, name = field.rpartition(".")
                result.append(f"--{group}{'.' if group else ''}{'no-' if default else ''}{name}")
        else:
            result += [f"--{field}", *value.split()]
    return result


def grid(dimensions: Sequence[Dimension]) -> list[dict[str, Value]]:
    """All combinations.

    Raises:
        UserError: there is a range.
    """
    if ranges := [dimension for dimension in dimensions if isinstance(dimension, Range)]:
        raise UserError(f"--algorithm grid with --try {ranges[0]}: a grid needs values, as {ranges[0].field}=a,b,c")
    return list(_combinations(dimensions))


def num_combinations(dimensions: Sequence[Dimension]) -> float:
    """Infinite with a range."""
    return math.prod(len(d.options) if isinstance(d, Choice) else math.inf for d in dimensions)


def draw(dimensions: Sequence[Dimension], count: int, seed: int) -> list[dict[str, Value]]:
    """``count`` random combinations, none of them twice. With another ``count`` the first ones are the same.

    Raises:
        UserError: there are fewer.
    """
    if (combinations := num_combinations(dimensions)) < count:
        raise UserError(
            f"--trials {count}: there are {combinations:.0f} combinations only; give fewer trials, --algorithm grid, or"
            " more to try"
        )
    rng = random.Random(f"sweep {seed}")
    if combinations <= _MAX_FINITE:
        every = list(_combinations(dimensions))
        rng.shuffle(every)
        return every[:count]
    drawn: list[dict[str, Value]] = []
    for _ in range(_MAX_DRAWS * count):
        combination = {dimension.field: dimension.draw(rng) for dimension in dimensions}
        if combination not in drawn:
            drawn.append(combination)
        if len(drawn) == count:
            return drawn
    raise UserError(f"--trials {count}: only {len(drawn)} different ones were found; give fewer trials, or more to try")


def corners(dimensions: Sequence[Dimension]) -> Iterator[dict[str, Value]]:
    """Combinations in which each value, or limit of a range, occurs at least once."""
    for i in range(max(len(dimension.ends) for dimension in dimensions)):
        yield {dimension.field: dimension.ends[i % len(dimension.ends)] for dimension in dimensions}


def _combinations(dimensions: Sequence[Dimension]) -> Iterator[dict[str, Value]]:
    listed = [dimension.options for dimension in dimensions if isinstance(dimension, Choice)]
    for combination in itertools.product(*listed):
        yield dict(zip((dimension.field for dimension in dimensions), combination, strict=True))
