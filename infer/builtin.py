"""The generators that ``catinfer`` has at hand: those in the package, and those of runs in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catgan.command import UserError, say

DEFAULT = "drawn-cats-64"
"""The built-in generator that ``catinfer`` uses without ``--onnx``."""

_FOLDER = Path(__file__).with_name("models")
_IN_RUN = "best/gen.onnx"


def builtin_models() -> dict[str, Path]:
    """The generators in the package by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.onnx"))}


def list_models(runs: str) -> dict[str, Any]:
    """Report the built-in generators and the best ones of the runs in the folder ``runs``, which may be missing.

    Returns:
        The JSON object of ``catinfer --list``: "models", a list of objects with "onnx" (what ``--onnx`` takes), "size"
        in pixels, "recipe", "kimg", "metric", "metric_value" (None where the file does not say), "classes" (their
        names, empty if there are none) and "bytes".

    Raises:
        UserError: ``runs`` cannot be read.
    """
    from infer.onnxfile import read_model

    found = []
    for name, path in [*builtin_models().items(), *((str(path), path) for path in _of_runs(Path(runs)))]:
        try:
            metadata = read_model(path).metadata
        except UserError as error:
            say(f"left out: {error}")
            continue
        found.append(_entry(name, path, metadata))
    for line in _table(found):
        say(line)
    return {"models": found}


def _of_runs(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.glob(f"*/{_IN_RUN}") if path.is_file())
    except OSError as error:
        raise UserError(f"--list {folder}: cannot be read ({error.strerror})") from error


def _entry(name: str, path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {
        "onnx": name,
        "size": _number(metadata, "size"),
        "recipe": metadata.get("recipe"),
        "kimg": _number(metadata, "kimg"),
        "metric": metadata.get("metric"),
        "metric_value": _number(metadata, "metric_value"),
        "classes": _classes(metadata),
        "bytes": path.stat().st_size,
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
    return int(value) if value.is_integer() else value


def _table(models: list[dict[str, Any]]) -> list[str]:
    """Lines for a terminal."""
    rows = [("--onnx", "pixels", "recipe", "kimg", "metric", "classes", "MB")]
    for model in models:
        metric = "" if model["metric_value"] is None else f"{model['metric']} {model['metric_value']:.2f}"
        kimg = "" if model["kimg"] is None else f"{model['kimg']:g}"
        size, recipe = str(model["size"] or ""), str(model["recipe"] or "")[:30]
        classes = str(len(model["classes"]) or "")
        rows.append((model["onnx"], size, recipe, kimg, metric[:40], classes, f"{model['bytes'] / 1e6:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
