"""Which files in a folder this project's commands wrote, so that sheets and sample grids are not read as photos.

A data set, a run and so on are recognised by files that only they hold together. A user's own ``contact.png`` in a
folder without a manifest and shards is not one of theirs.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

RUN = "training run"

_SHARD = r"(train|val)-\d{6,}\.tar"
_SHEETS = (r"rejected\.csv", r"(contact|rejected)\.png")
_CHECKPOINT = r"checkpoint_\d{9,}"


class _Kind(NamedTuple):
    """What a command writes: ``markers`` match names that all have to be there, ``files`` all names it writes."""

    name: str
    markers: tuple[re.Pattern[str], ...]
    files: re.Pattern[str]


def _kind(name: str, markers: Iterable[str], files: Iterable[str]) -> _Kind:
    markers = tuple(markers)
    return _Kind(name, tuple(map(re.compile, markers)), re.compile("|".join((*markers, *files))))


_KINDS = (
    _kind("data set", (r"manifest\.json", _SHARD), _SHEETS),
    _kind("unfinished data set", (r"work\.sqlite",), (r"work\.sqlite-.*", r"manifest\.json", _SHARD, *_SHEETS)),
    _kind(
        RUN,
        (r"config\.json", rf"(metrics|outbox)\.jsonl|{_CHECKPOINT}"),
        ("samples", "best", r"reals\.png", r"progress\.(gif|mp4)", r"report\.html", r"outbox(\.files)?\.json"),
    ),
    _kind("exported generator", (r"card\.md", r".+\.(onnx|safetensors)"), (r"(samples|directions)\.png",)),
    _kind("MLflow store", (r"mlflow\.db", "mlartifacts"), ()),
)
_SHOWN = 3  # folders in a message
_NAMES = re.compile("|".join(kind.files.pattern for kind in _KINDS))


def own_files(names: Collection[str]) -> dict[str, str]:
    """Of the files and folders ``names`` in one folder, those that a command of this project wrote.

    Returns:
        {name: kind of the folder}, such as ``RUN``.
    """
    found: dict[str, str] = {}
    for kind in _KINDS:
        if all(any(map(marker.fullmatch, names)) for marker in kind.markers):
            found |= {name: kind.name for name in names if kind.files.fullmatch(name)}
    return found


def owner(path: Path) -> tuple[Path, str] | None:
    """The folder, at most two levels above the absolute ``path``, that ``path`` belongs to, and its kind; None if there
    is none, or it cannot be listed."""
    for child, folder in zip((path, *path.parents), path.parents[:2], strict=False):
        if _NAMES.fullmatch(child.name):  # before listing a folder, which can be large
            with contextlib.suppress(OSError):
                if kind := own_files([entry.name for entry in folder.iterdir()]).get(child.name):
                    return folder, kind
    return None


def in_words(folders: Mapping[str, str]) -> str:
    """The first of some folders with their kinds, for a message."""
    shown = ", ".join(f"{folder} ({kind})" for folder, kind in itertools.islice(folders.items(), _SHOWN))
    return f"{shown} and {len(folders) - _SHOWN} more" if len(folders) > _SHOWN else shown


class OwnFiles:
    """The same for the paths in an archive, which need not be sorted: ``note`` each path, then ask for ``owner``."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}  # of files and folders that may be ours, by folder

    def note(self, path: str) -> bool:
        """Note a path in the archive. Returns whether it may turn out to be ours."""
        parts = path.split("/")
        candidates = [level for level, part in enumerate(parts) if _NAMES.fullmatch(part)]
        for level in candidates:
            self._names.setdefault("/".join(parts[:level]), set()).add(parts[level])
        return bool(candidates)

    def owner(self, path: str) -> tuple[str, str] | None:
        """The folder in the archive and its kind to which ``path`` belongs; None if to none of the paths noted."""
        parts = path.split("/")
        for level, part in enumerate(parts):
            folder = "/".join(parts[:level])
            if kind := own_files(self._names.get(folder, ())).get(part):
                return folder, kind
        return None
