"""The generators that ``catinfer`` has at hand: in the package, of runs in a folder, and in a model registry."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import UserError, say
from infer.values import RUNS

if TYPE_CHECKING:
    from infer.registry import Registered

DEFAULT = "drawn-cats-64"
"""The built-in generator that ``catinfer`` uses without ``--onnx``."""

_FOLDER = Path(__file__).with_name("models")
_IN_RUN = "best/gen.onnx"


def builtin_models() -> dict[str, Path]:
    """The generators in the package by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.onnx"))}


def is_web_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def list_models(place: str) -> dict[str, Any]:
    """Report the built-in generators, and those of a folder of runs or of an MLflow registry.

    Args:
        place: a folder, which may be missing: the best generators of the runs in it, and those in the registry at
            ``MLFLOW_REGISTRY_URI``, else ``MLFLOW_TRACKING_URI``, if that is a web address. Or the web address of an
            MLflow server: those in its registry. A server that does not answer is a message.

    Returns:
        The JSON object of ``catinfer --list``: "models", a list of objects with "onnx" (what ``--onnx`` takes), "size"
        in pixels, "recipe", "kimg", "metric", "metric_value" (None where the file does not say), "classes" (their
        names, empty if there are none) and "bytes". Of a generator in a registry "onnx", "size" and "bytes" are None,
        "model" is its name there and "download" the address of its file.

    Raises:
        UserError: the folder cannot be read.
    """
    from infer.onnxfile import read_model

    found = []
    if not is_web_address(place) and place != RUNS and not Path(place).exists():
        say(f"left out: the runs in {place}, which does not exist")
    runs = [] if is_web_address(place) else _of_runs(Path(place))
    for name, path in [*builtin_models().items(), *((str(path), path) for path in runs)]:
        try:
            metadata = read_model(path).metadata
        except UserError as error:
            say(f"left out: {error}")
            continue
        found.append(_entry(name, metadata, path.stat().st_size))
    registered = _registered(place)
    for one in registered:
        found.append({**_entry(None, one.tags, None), "model": one.model, "download": one.download})
    for line in _table(found):
        say(line)
    if registered:
        say(f"To use {registered[0].model}: {registered[0].command}")
    return {"models": found}


def _registered(place: str) -> Sequence[Registered]:
    address = place if is_web_address(place) else ""
    address = address or os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not is_web_address(address):
        return ()

    from infer.registry import MAX_MODELS, Unavailable, find

    try:
        found = find(address)
    except Unavailable as error:
        say(f"left out: {error}")
        return ()
    if len(found) == MAX_MODELS:
        say(f"left out: what the registry has besides these {MAX_MODELS} generators")
    return found


def _of_runs(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.glob(f"*/{_IN_RUN}") if path.is_file())
    except OSError as error:
        raise UserError(f"--list {folder}: cannot be read ({error.strerror})") from error


def _entry(name: str | None, metadata: Mapping[str, str], size: int | None) -> dict[str, Any]:
    return {
        "onnx": name,
        "size": _number(metadata, "size"),
        "recipe": metadata.get("recipe"),
        "kimg": _number(metadata, "kimg"),
        "metric": metadata.get("metric"),
        "metric_value": _number(metadata, "metric_value"),
        "classes": _classes(metadata),
        "bytes": size,
    }


def _classes(metadata: Mapping[str, str]) -> list[str]:
    from infer.classes import ENTRY, parse_names

    try:
        return list(parse_names(metadata[ENTRY]))
    except (KeyError, ValueError):
        return []


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(metadata[key])
    except (KeyError, ValueError):
        return None
    if not math.isfinite(value):  # JSON has no such numbers
        return None
    return int(value) if value.is_integer() else value


def _table(models: list[dict[str, Any]]) -> list[str]:
    """Lines for a terminal."""
    rows = [("--onnx", "pixels", "recipe", "kimg", "metric", "classes", "MB")]
    for model in models:
        metric = "" if model["metric_value"] is None else f"{model['metric']} {model['metric_value']:.2f}"
        kimg = "" if model["kimg"] is None else f"{model['kimg']:g}"
        size, recipe = str(model["size"] or ""), str(model["recipe"] or "")[:30]
        classes = str(len(model["classes"]) or "")
        name, megabytes = model["onnx"], "" if model["bytes"] is None else f"{model['bytes'] / 1e6:.1f}"
        rows.append((name or model["model"], size[:6], recipe, kimg, metric[:40], classes, megabytes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
