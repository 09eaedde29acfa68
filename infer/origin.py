"""``catinfer inspect``: what a file says about its origin, and the command that makes it again.

The files may be from anyone. Nothing in them is decoded but the metadata, whose size is limited and whose values are
checked before they appear in a command.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.parsers import expat

from catgan.command import UserError, say
from catgan.text import to_json
from infer.builtin import builtin_models
from infer.classes import parse_names
from infer.containers import MAX_XMP, DamagedError, file_format, find_xmp
from infer.onnxfile import read_model
from infer.provenance import KINDS, MAX_CLASSES_TEXT, MAX_PSIS_TEXT, MAX_SEEDS_TEXT, NAMESPACES, RDF, this_software
from infer.values import MAX_DIRECTION, MAX_N, MAX_PSI, MAX_SEED

_SUFFIXES = {
    "sheet": {"png": ".png", "jpeg": ".jpg", "webp": ".webp"},
    "walk": {"gif": ".gif", "webp": ".webp", "mp4": ".mp4"},
}
_DIRECTIONS = "directions"  # the entry of infer.directions, which imports NumPy
_UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        "digital_source_type",
        "creator_tool",
        "kind",
        "generator_sha256",
        "seeds",
        "seed_count",
        "seeds_sha256",
        "psi",
        "labels",
        "device",
        "mix",
        "directions",
        "classes",
        "class_count",
        "command",
    )
)


def inspect(paths: Sequence[str]) -> dict[str, Any]:
    """What the image, video and ONNX files ``paths`` say about their origin: the JSON object of ``catinfer inspect``.

    For each image that ``catinfer`` can make again, says how on stderr, with its generator if that is built in or
    one of ``paths``.

    Raises:
        UserError: a file cannot be read, is damaged, or has another format.
    """
    records = [_inspect(Path(path)) for path in paths]
    generators = {hashlib.sha256(path.read_bytes()).hexdigest(): name for name, path in builtin_models().items()}
    generators |= {record["generator_sha256"]: record["file"] for record in records if record["format"] == "onnx"}
    for record in records:
        if record["format"] != "onnx":
            _explain(record, generators.get(record["generator_sha256"]))
    return {"files": records}


def _inspect(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            problem = "is a directory" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {problem}; give images, walks or gen.onnx")
        with path.open("rb") as file:
            kind = file_format(file.read(12))
            if kind is not None:
                packet = find_xmp(file, kind)
                return {"file": str(path), "format": kind, **_UNKNOWN, **(read_packet(packet) if packet else {})}
    except DamagedError as error:
        raise UserError(f"{path}: {error}; not a complete file, or damaged") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() != ".onnx":
        raise UserError(f"{path}: not an image, video or generator: known are PNG, JPEG, WebP, GIF, MP4 and .onnx")
    model = read_model(path)
    if len(to_json(model.metadata)) > MAX_XMP:
        raise UserError(f"{path}: has more than {MAX_XMP:,} bytes of metadata")
    digest = hashlib.sha256(model.data).hexdigest()
    return {"file": str(path), "format": "onnx", "generator_sha256": digest, "metadata": _shown(model.metadata)}


def _shown(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata with the length of the directions instead of their numbers, thousands of characters."""
    numbers = metadata.get(_DIRECTIONS)
    return metadata if numbers is None else metadata | {_DIRECTIONS: f"{len(numbers):,} characters"}


def _explain(record: dict[str, Any], onnx: str | None) -> None:
    """Say on stderr what the record of an image means, and put the command into it."""
    path, tool = record["file"], (record["creator_tool"] or "an unknown program")[:80]
    if record["kind"] is None:
        marked = record["digital_source_type"] or record["creator_tool"]
        say(f"{path}: {'not made by catgan' if marked else 'says nothing about its origin'}")
        return
    if record["kind"] == "training":
        say(f"{path}: images of a generator in training, by {tool}")
        return
    if record["kind"] == "blend":
        say(
            f"{path}: made by {tool} on the page of catexport --web; its address shows it again with {_address(record)}"
        )
        return
    record["command"] = command(record, onnx or "gen.onnx")
    if record["command"] is None:
        say(f"{path}: made by {tool}; the file does not hold all that is needed to make it again in its format")
        return
    where = "" if onnx else f"; gen.onnx stands for the generator with SHA-256 {record['generator_sha256']}"
    other = "" if tool == this_software() else f", this is {this_software()}, whose file may differ"
    say(f"{path}: made by {tool}{other}; this command makes it again{where}:")
    say(record["command"])


def command(record: dict[str, Any], onnx: str) -> str | None:
    """The command, for a shell, that makes the file of a record again with the generator ``onnx``; None if the record
    does not hold all that it depends on, or ``catinfer`` does not write its kind in its format."""
    kind, seeds, psi = record["kind"], record["seeds"], record["psi"]
    suffix = _SUFFIXES["walk" if kind == "walk" else "sheet"].get(record["format"])
    chosen = _seed_options(seeds) if seeds else None
    if suffix is None or chosen is None or not psi or not record["generator_sha256"]:
        return None
    if record["class_count"] and not record["classes"]:
        return None
    words = ["catinfer", "--onnx", f"./{onnx}" if onnx.startswith("-") else onnx, *chosen]
    if kind == "sweep":
        words += ["--truncation-sweep", ",".join(map(repr, psi))]
    else:
        words += ["--psi", repr(psi[0])]
    for number, amount in (record["directions"] or {}).items():
        words += ["--direction", f"{number}={amount!r}"]
    words += [f"--class={name}" for name in record["classes"] or ()]
    if record["labels"]:
        words.append("--labels")
    if record["device"]:
        words += ["--device", record["device"]]
    match kind:
        case "image":
            words += ["--out", "again/", "--format", suffix.removeprefix(".")]
        case "walk":
            words += ["--interpolate", f"again{suffix}"]
        case _:
            words += ["--out", f"again{suffix}"]
    return shlex.join(words)


def _seed_options(seeds: str) -> list[str] | None:
    """The options for a list such as ``3,7-12``; None if there are none."""
    first, last = _range(seeds) if "," not in seeds else (0, MAX_SEED + 1)
    if first > MAX_SEED:
        return None
    if "," not in seeds:
        return ["--seed", str(first), "--n", str(last - first + 1)]
    return ["--seeds", seeds] if all(_range(part)[1] <= MAX_SEED for part in seeds.split(",")) else None


def _range(part: str) -> tuple[int, int]:
    first, _, last = part.partition("-")
    return int(first), int(last or first)


def _address(record: dict[str, Any]) -> str:
    """The end of the page's address, see ``export/web/app.js``."""
    ranges = map(_range, record["seeds"].split(","))
    left, right = (seed for first, last in ranges for seed in range(first, last + 1))
    moves = "".join(f"&d{number}={amount:g}" for number, amount in (record["directions"] or {}).items())
    chosen = "".join(f"&class={quote(name)}" for name in record["classes"] or ())
    return f"#left={left}&right={right}&mix={record['mix']}&psi={record['psi'][0]:g}{chosen}{moves}"


def read_packet(packet: bytes) -> dict[str, Any]:
    """What an XMP packet says about the origin of its file, of the properties that ``catinfer inspect`` reports.

    Raises:
        DamagedError: it is not well-formed, has a document type, or this project's properties have impossible values.
    """
    found = _properties(packet)
    record: dict[str, Any] = {
        "digital_source_type": found.get("Iptc4xmpExt:DigitalSourceType"),
        "creator_tool": found.get("xmp:CreatorTool"),
    }
    for name, (key, parse) in _OURS.items():
        if (text := found.get(f"catgan:{name}")) is not None:
            try:
                record[key] = parse(text)
            except ValueError as error:
                raise DamagedError(f"has impossible metadata, {name} {text[:40]!r}") from error
    if "kind" in record:
        record.setdefault("labels", False)
    if "seeds" in record:
        record["seed_count"] = sum(last - first + 1 for first, last in map(_range, record["seeds"].split(",")))
    if "classes" in record:
        record["class_count"] = len(record["classes"])
    if record.get("kind") == "blend" and not ({"seeds", "mix", "psi"} <= record.keys() and record["seed_count"] == 2):
        raise DamagedError("has incomplete metadata")
    return record


def _properties(packet: bytes) -> dict[str, str]:
    """The simple properties of ``NAMESPACES`` in a packet, as attributes or elements: name with prefix -> text."""
    prefixes = {uri: prefix for prefix, uri in NAMESPACES.items()}
    found: dict[str, str] = {}
    path: list[str] = []
    text: list[str] = []

    def name_of(name: str) -> str | None:
        uri, _, local = name.rpartition(" ")
        return f"{prefixes[uri]}:{local}" if uri in prefixes else None

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == f"{RDF} Description":
            found.update({known: value for key, value in attributes.items() if (known := name_of(key))})
        elif path and path[-1] == f"{RDF} Description":
            text.clear()
            text.append(attributes.get(f"{RDF} resource", ""))
        path.append(name)

    def end(name: str) -> None:
        path.pop()
        if path and path[-1] == f"{RDF} Description" and (known := name_of(name)):
            found[known] = "".join(text).strip()

    def refuse(*_: object) -> None:
        raise DamagedError("has metadata with a document type, which no program needs there")

    parser = expat.ParserCreate("UTF-8", " ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse  # without one there are no entities that could expand
    try:
        parser.Parse(packet.rstrip(b"\0 "), True)
    except expat.ExpatError as error:
        raise DamagedError(f"has metadata that is not XML ({error})") from error
    return found


def _matching(pattern: str) -> Any:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError
        return text

    return parse


def _seeds(text: str) -> str:
    if len(text) > MAX_SEEDS_TEXT:
        raise ValueError
    for part in text.split(","):
        if not re.fullmatch(r"\d{1,10}(-\d{1,10})?", part, re.ASCII):
            raise ValueError
        first, last = _range(part)
        if not first <= last <= MAX_SEED + MAX_N:
            raise ValueError
    return text


def _psis(text: str) -> list[float]:
    if len(text) > MAX_PSIS_TEXT:
        raise ValueError
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= MAX_PSI for value in values):
        raise ValueError
    return values


def _percentage(text: str) -> int:
    if not 0 <= (value := int(text)) <= 100:
        raise ValueError
    return value


def _directions(text: str) -> dict[str, float]:
    moves = {}
    for part in text.split(","):
        if not (found := re.fullmatch(r"([1-9]\d{0,2})=([-+.e\d]{1,30})", part, re.ASCII)):
            raise ValueError
        moves[found[1]] = amount = float(found[2])
        if not -MAX_DIRECTION <= amount <= MAX_DIRECTION:
            raise ValueError
    return moves


def _classes(text: str) -> list[str]:
    if len(text) > MAX_CLASSES_TEXT:
        raise ValueError
    return list(parse_names(text))


_OURS: dict[str, tuple[str, Any]] = {
    "Kind": ("kind", _matching("|".join(KINDS))),
    "GeneratorSHA256": ("generator_sha256", _matching("[0-9a-f]{64}")),
    "Seeds": ("seeds", _seeds),
    "SeedCount": ("seed_count", lambda text: int(_matching(r"\d{1,10}")(text))),
    "SeedsSHA256": ("seeds_sha256", _matching("[0-9a-f]{64}")),
    "Psi": ("psi", _psis),
    "Labels": ("labels", lambda text: _matching("True|False")(text) == "True"),
    "Device": ("device", _matching("cpu|cuda")),
    "Mix": ("mix", _percentage),
    "Directions": ("directions", _directions),
    "Classes": ("classes", _classes),
    "ClassCount": ("class_count", lambda text: int(_matching(r"\d{1,4}")(text))),
}
