"""The paths of the service and their parameters: one table that checks requests and becomes the OpenAPI description."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from catgan.command import UserError, number
from infer.classes import Class, check_one, choose, class_of
from infer.values import DEFAULT_N, MAX_PSI, MAX_SEED, parse_seeds
from infer.walk import STEPS

IMAGE, GRID, WALK = "/image", "/grid", "/walk"

TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "npy": "application/octet-stream",
}

MAX_QUERY = 8192  # characters; MAX_IMAGES seeds of ten digits fit
# Of one request. The pixels of all of its images are in memory. A GIF of 32 MiB takes about ten seconds to encode.
MAX_IMAGES = 256
MAX_BYTES = 2**27
MAX_WALK_SEEDS = 16
MAX_WALK_BYTES = 2**25


class QueryTooLong(UserError):
    """The query has more than ``MAX_QUERY`` characters."""


@dataclass(frozen=True)
class ImageRequest:
    """A checked request for images. Equal requests get the same bytes.

    Attributes:
        path: ``IMAGE``, ``GRID`` or ``WALK``.
        seeds: one for ``IMAGE``, at least two for ``WALK``.
        psi: truncation, see ``infer.session.Generator``.
        format: a key of ``TYPES``.
        classes: one for ``IMAGE`` and ``WALK``; none if the generator has none. On a sheet one row for each of several;
            in an array they take turns with the seeds, see ``infer.classes.class_of``.
    """

    path: str
    seeds: tuple[int, ...]
    psi: float
    format: str
    classes: tuple[Class, ...] = ()

    @property
    def rows(self) -> tuple[Class, ...]:
        """The classes of the rows of a sheet of several."""
        return self.classes if self.path == GRID and self.format != "npy" and len(self.classes) > 1 else ()

    @property
    def images(self) -> int:
        """The number of images that the generator computes."""
        return len(self.seeds) * (STEPS if self.path == WALK else len(self.rows) or 1)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a query.

    Attributes:
        meaning: for the description.
        parse: from its text; raises ``argparse.ArgumentTypeError``, as for an option of ``catinfer``.
        schema: of its value, JSON Schema.
        default: its value if it is missing, None if that depends on others.
        is_required: whether it must be given.
    """

    name: str
    meaning: str
    parse: Callable[[str], Any]
    schema: Mapping[str, Any]
    default: Any = None
    is_required: bool = False


@dataclass(frozen=True)
class Path:
    """One path of the service.

    Attributes:
        summary: one line.
        types: media types of its answer.
        parameters: by name.
    """

    summary: str
    types: tuple[str, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def paths(size: int, classes: Sequence[str] = ()) -> dict[str, Path]:
    """All paths of a generator with images of ``size`` pixels, which limits how many a request can have, and with
    ``classes``."""
    most = max(1, min(MAX_IMAGES, MAX_BYTES // (3 * size**2)))
    walk = max(2, min(MAX_WALK_SEEDS, MAX_WALK_BYTES // (3 * size**2 * STEPS)))
    seed = _number("seed", "the seed of image 0", int, MAX_SEED, default=0)
    psi = _number(
        "psi",
        "truncation: below 1 cats are more typical and alike, above 1 more unusual",
        float,
        MAX_PSI,
        default=1.0,
    )
    # So that there may be a row for each class; of more classes than images, the first ones have one each.
    usual = min(DEFAULT_N, max(1, most // max(1, len(classes))))
    n = _number("n", "number of images, with the seeds from seed on", int, most, default=usual, low=1)
    default = "by default the classes take turns with the seeds"
    image_class = _class(classes, f"the class of the image; {default}", is_one=True)
    walk_class = _class(classes, "the class of the images", is_one=True, is_required=len(classes) > 1)
    first = f", on a sheet the first {most}" if len(classes) > most else ""
    grid_class = _class(
        classes,
        f"one or several; a sheet has a row of the seeds for each of several, at most {most} images in total; in an "
        f"array they take turns with the seeds; by default all{first}",
        is_one=False,
    )
    return {
        IMAGE: _images("one image", ("png", "jpg", "webp", "npy"), seed, psi, *image_class),
        GRID: _images(
            "several images on one sheet, or as one array, uint8 [n, size, size, 3]",
            ("png", "jpg", "webp", "npy"),
            seed,
            n,
            _seeds(f"these seeds instead of n and seed, at most {most}", most),
            psi,
            *grid_class,
        ),
        WALK: _images(
            f"an endless walk through the latents of the seeds, {STEPS} frames (one second) from each to the next",
            ("gif", "webp"),
            _seeds(f"2 to {walk} seeds", walk, is_required=True),
            psi,
            *walk_class,
        ),
        "/info": Path("the model, its metadata, versions and limits", ("application/json",)),
        "/healthz": Path("whether images can be computed", ("application/json",)),
        "/metrics": Path("counters and timings in the text format of Prometheus", ("text/plain",)),
        "/openapi.json": Path("this description, OpenAPI 3.1", ("application/json",)),
    }


def _images(summary: str, formats: tuple[str, ...], *parameters: Parameter) -> Path:
    chosen = Parameter(
        "format",
        "of the file; PNG and WebP are lossless",
        _choice(formats),
        {"type": "string", "enum": list(formats)},
        formats[0],
    )
    types = tuple(TYPES[name] for name in formats)
    return Path(summary, types, {parameter.name: parameter for parameter in (*parameters, chosen)})


def _number(
    name: str, meaning: str, kind: type[int] | type[float], high: float, *, default: float, low: int = 0
) -> Parameter:
    schema = {"type": "integer" if kind is int else "number", "minimum": low, "maximum": high}
    return Parameter(name, meaning, number(kind, low, high), schema, default)


def _seeds(meaning: str, most: int, is_required: bool = False) -> Parameter:
    schema = {"type": "string", "pattern": r"^\d{1,10}(-\d{1,10})?(,\d{1,10}(-\d{1,10})?)*$", "examples": ["3,7-12"]}
    return Parameter("seeds", meaning, lambda text: parse_seeds(text, most), schema, is_required=is_required)


def _class(classes: Sequence[str], meaning: str, *, is_one: bool, is_required: bool = False) -> list[Parameter]:
    """The parameter ``class``; none if there are no ``classes``. Its value is a tuple of ``Class``."""
    if not classes:
        return []

    def parse(text: str) -> tuple[Class, ...]:
        chosen = choose(classes, [text], "class")
        if is_one:
            check_one(chosen, classes, "class", "this path")
        return chosen

    schema = {"type": "string", **({"enum": list(classes)} if is_one else {"examples": [",".join(classes[:2])]})}
    return [Parameter("class", meaning, parse, schema, is_required=is_required)]


def _choice(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(allowed)})")
        return text

    return parse


def parse_query(path: Path, query: str) -> dict[str, Any]:
    """The values of a query, by name; a missing parameter has its default.

    Raises:
        UserError: a parameter is wrong, missing, unknown or given twice.
        QueryTooLong: the query is longer than ``MAX_QUERY``.
    """
    if len(query) > MAX_QUERY:
        raise QueryTooLong(f"the query has {len(query):,} characters, allowed are {MAX_QUERY:,}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict", max_num_fields=16)
    except ValueError as error:  # a UnicodeDecodeError among others
        raise UserError(f"the query is not a list of name=value, joined by &, in UTF-8 ({error})") from error
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name not in path.parameters:
            raise UserError(f"unrecognized parameter: {name!r} (choose from {', '.join(path.parameters) or 'none'})")
        if name in values:
            raise UserError(f"{name}: is given twice")
        try:
            values[name] = path.parameters[name].parse(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from error
    for name, parameter in path.parameters.items():
        if parameter.is_required and name not in values:
            example = (parameter.schema.get("enum") or parameter.schema["examples"])[0]
            raise UserError(f"{name}: is required: {parameter.meaning}, such as {name}={example}")
    if "seeds" in values and ("n" in values or "seed" in values):
        raise UserError("seeds gives the seeds and their number: omit n and seed")
    return {name: parameter.default for name, parameter in path.parameters.items()} | values


def image_request(name: str, path: Path, query: str, classes: Sequence[str] = ()) -> ImageRequest:
    """The request for ``name``, one of ``IMAGE``, ``GRID`` and ``WALK``, to a generator with ``classes``. Raises as
    ``parse_query`` does."""
    values = parse_query(path, query)
    seeds = values.get("seeds") or range(values["seed"], values["seed"] + values.get("n", 1))
    if name == WALK and len(seeds) < 2:
        raise UserError(f"seeds: walks through {path.parameters['seeds'].meaning}, {len(seeds)} given")
    chosen = values.get("class")
    if chosen is None:
        chosen = choose(classes, [], "class")
        if name == GRID and values["format"] != "npy":
            chosen = chosen[: path.parameters["n"].schema["maximum"]]
    if name == IMAGE and (one := class_of(seeds[0], chosen)):
        chosen = (one,)
    request = ImageRequest(name, tuple(seeds), values["psi"], values["format"], chosen)
    if request.rows and request.images > (most := path.parameters["n"].schema["maximum"]):
        raise UserError(
            f"n: {len(seeds)} seeds in {len(chosen)} classes are {request.images:,} images, allowed are {most}; give "
            "fewer seeds or classes"
        )
    return request
