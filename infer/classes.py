"""Classes of a class-conditional generator: their names in its metadata, and the choice of ``catinfer --class``.

The metadata entry ``classes`` is a JSON list of names; the index of a name is the int64 ``label`` that the graph takes.
Files may be from anyone, so number and length of the names are limited, and a name is one printable line.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import NamedTuple

from catgan.command import UserError

ENTRY = "classes"
MAX_CLASSES = 1000
MAX_NAME = 100  # characters
ALL = "all"
_MAX_TEXT = MAX_CLASSES * (12 * MAX_NAME + 4)  # with every character as two \uXXXX
_SHOWN = 300  # characters of names in a message
_MAX_COMPARED = 100  # names that a wrong one is compared with; the service waits for it
_LABEL = re.compile(r"\d{1,4}", re.ASCII)


class Class(NamedTuple):
    """One class: what the graph takes, and its name."""

    label: int
    name: str


def parse_names(text: str) -> tuple[str, ...]:
    """The names in a JSON list. Raises ``ValueError`` unless they are as described above, unique, and at least one."""
    if len(text) > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT:,} characters")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of names")
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{len(names):,} names, allowed are 1 to {MAX_CLASSES:,}")
    for name in names:
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
            raise ValueError(f"the name {name[:40]!r}, allowed are 1 to {MAX_NAME} printable characters")
    if len(set(names)) < len(names):
        raise ValueError("a name twice")
    return tuple(names)


def read_classes(metadata: Mapping[str, str], path: str | PathLike[str]) -> tuple[str, ...]:
    """The names of the classes of the generator at ``path``, whose graph takes a label.

    Raises:
        UserError: there is no entry, or not one as described above.
    """
    if ENTRY not in metadata:
        raise UserError(f"{path}: takes a label, but its metadata has no entry {ENTRY!r}; export it again")
    try:
        return parse_names(metadata[ENTRY])
    except ValueError as error:
        raise UserError(
            f"{path}: its metadata has an entry {ENTRY!r} that cannot be used: {error}; export it again"
        ) from error


def choose(names: Sequence[str], texts: Sequence[str], option: str) -> tuple[Class, ...]:
    """The classes that ``texts`` name, each once, in their order; all of ``names`` if there are no texts.

    A text is a name, else ``all``, else a label, else several of these with commas between them.

    Args:
        names: of the generator's classes, by label; empty if it has none.
        option: where the texts are given, for messages.

    Raises:
        UserError: there is no such class, or one is named twice.
    """
    if texts and not names:
        raise UserError(f"{option}: {texts[0][:MAX_NAME]!r} is given, but the generator has no classes: omit it")
    if not texts:  # not the text "all", which may be a name
        return tuple(Class(label, name) for label, name in enumerate(names))
    labels = {name: label for label, name in enumerate(names)}
    chosen: dict[Class, None] = {}
    for text in texts:
        if _find(text, labels):
            parts = [text]
        elif (count := text.count(",") + 1) > len(names) + 1:
            raise UserError(
                f"{option}: {text[:MAX_NAME]!r} has {count:,} parts, but the generator has {len(names)} classes; give "
                "each once"
            )
        else:
            parts = [part.strip() for part in text.split(",")]
        for part in parts:
            for one in _find(part, labels, option):
                if one in chosen:
                    raise UserError(f"{option}: {', '.join(texts)[:MAX_NAME]!r} names a class twice; give each once")
                chosen[one] = None
    return tuple(chosen)


def _find(text: str, labels: Mapping[str, int], option: str | None = None) -> list[Class]:
    """The classes of a text without commas; ``labels`` has those of all names, in order. If there are none: an empty
    list, or with ``option`` a ``UserError``."""
    # Names from folders of a Mac have decomposed letters; those in a data set are composed.
    for name in (text, unicodedata.normalize("NFC", text)):
        if name in labels:
            return [Class(labels[name], name)]
    names = list(labels)
    if text == ALL:
        return [Class(label, name) for label, name in enumerate(names)]
    if _LABEL.fullmatch(text) and int(text) < len(names):
        return [Class(int(text), names[int(text)])]
    if option is None:
        return []
    import difflib

    folded = {name.casefold(): name for name in names} if len(names) <= _MAX_COMPARED else {}
    near = difflib.get_close_matches(text[:MAX_NAME].casefold(), folded, 1)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    raise UserError(
        f"{option}: {text[:MAX_NAME]!r} is given, {hint}allowed are {listed(names)}, and the numbers below {len(names)}"
    )


def check_one(chosen: Sequence[Class], names: Sequence[str], option: str, what: str) -> None:
    """Raise ``UserError`` if more than one class is chosen for ``what``, which shows one."""
    if len(chosen) > 1:
        raise UserError(f"{what} shows one class: give one as {option}, of {listed(names)}")


def listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    shown = [names[0]]
    for name in names[1:]:
        if len(", ".join([*shown, name])) > _SHOWN:
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
        shown.append(name)
    return ", ".join(shown)


def class_of(seed: int, chosen: Sequence[Class]) -> Class | None:
    """The class of the image of ``seed`` where each image has one of ``chosen``: they take turns with the seeds, so it
    does not depend on other images. None if there are none."""
    return chosen[seed % len(chosen)] if chosen else None


def labels_of(seeds: Iterable[int], chosen: Sequence[Class]) -> list[int]:
    """The labels of ``class_of``; zeros if there are no classes."""
    found = [class_of(seed, chosen) for seed in seeds]
    return [one.label if one else 0 for one in found]
