"""The description with which a run is opened in MLflow: params, tags and the data set."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from catgan.command import without_queries
from catgan.dataset import Manifest
from catgan.text import printable
from trainer.tracking.messages import redact

# MLflow's own limits (mlflow/utils/validation.py).
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36

_REPOSITORY = Path(__file__).resolve().parents[2]


def describe(config: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The fields of an ``open`` record that describe a training with the nested ``config`` on ``manifest``'s data."""
    return {
        "user": os.environ.get("USER", "unknown"),
        "params": dict(_flatten(config)),
        "tags": code_version(_REPOSITORY) | {"recipe": str(config["recipe"])},
        "dataset": _dataset(manifest),
    }


def code_version(root: Path) -> dict[str, str]:
    """Tags: the package's version and, if ``root`` is a checkout, its commit and whether files differ from it."""
    tags = {}
    with contextlib.suppress(PackageNotFoundError):
        tags["catgan.version"] = version("catgan")
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD") or "none"
        tags["git.dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def _git(root: Path, *args: str) -> str | None:
    """The output of git; None without git or a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"a": {"b": (1, 2)}}`` -> ``("a.b", "1 2")``, cut to MLflow's limit, without passwords in URLs."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", printable(redact(text))[:_PARAM_LENGTH]


def _dataset(manifest: Manifest) -> dict[str, Any]:
    """Name, identity and counts of the data; MLflow identifies data by the first characters of the digest."""
    images = {f"{name}_images": split.images for name, split in manifest.splits.items()}
    shards = {f"{name}_shards": len(split.shards) for name, split in manifest.splits.items()}
    root = printable(without_queries(redact(str(manifest.root))))
    return {
        "name": Path(root).name or "data",
        "digest": manifest.digest[:_DIGEST_LENGTH],
        "source": {"uri": root},
        "profile": {"size": manifest.size, **images, **shards, "digest": manifest.digest},
    }
