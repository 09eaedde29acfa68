"""The class of each image, from its folder or from a table."""

from __future__ import annotations

import codecs
import collections
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from catgan.command import UserError, say
from catgan.location import local_path
from catgan.text import printable
from trainer.data.build.names import class_name, comparable, composed, decode_text, member_name, resemblance

FOLDER = "folder"
_HEADER = ["file", "label"]
_DELIMITERS = ",;\t"
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SHOWN = 3  # examples in a message


class Labels:
    """The labels of a data set.

    Args:
        given: ``"folder"`` to label each file with the name of its folder, or the path of a table, see ``_Table``.

    Raises:
        UserError: the table cannot be read, has another header, an empty field, or lists a file twice.
    """

    def __init__(self, given: str | Path) -> None:
        self._table = None if given == FOLDER else _Table(local_path(given))
        self._spellings: dict[str, set[str]] = collections.defaultdict(set)

    @property
    def identity(self) -> str:
        """Equal for equal labels: a SHA-256 (hex) of the table, or ``"folder"``."""
        return FOLDER if self._table is None else self._table.identity

    def of(self, name: str, kind: str) -> str | None:
        """The label of the file ``name`` in a source of this ``kind`` (see ``sources.Source``); None if it has none."""
        is_archive = kind in ("zip", "tar")
        if self._table is None:
            # The first part of a name in an archive is the archive itself, which is not a folder.
            parts = member_name(name).split("/")
            folders = parts[:-1] if kind == "folder" else parts[1:-1] if is_archive else []
            written = folders[-1] if folders else ""
        else:
            written = self._table.find(name, is_archive) or ""
        label = class_name(written)
        if label:
            self._spellings[label].add(written)
        return label or None

    def remarks(self) -> Iterator[str]:
        """What is doubtful, each in one line, after ``of`` was called for all files."""
        if self._table is not None and (unused := self._table.unused()):
            yield f"labels: {len(unused)} of {len(self._table)} rows match no file: {_some(unused)}"
        similar = collections.defaultdict(list)
        for label, spellings in sorted(self._spellings.items()):
            similar[resemblance(label)].append(label)
            if len(apart := sorted({composed(one) for one in spellings})) > 1:
                yield f"labels: {_some(apart)} differ only in blanks or invisible characters and are one class"
        for labels in similar.values():
            if len(labels) > 1:
                yield f"labels: {_some(labels)} differ only in case, blanks, - or _, and are {len(labels)} classes"


class _Table:
    """A table of labels, with the header ``file,label``, separated by commas, semicolons or tabs.

    It is UTF-8, UTF-16, or else Windows-1252. A row applies to the files whose name (as in ``rejected.csv``) equals its
    ``file`` or ends with ``/`` and its ``file``; if several rows apply, the longest ``file`` wins. If none does, a row
    applies whose ``file``, a path on the machine of its author, ends with ``/`` and the name. Paths are compared in one
    form, see ``names.comparable``, and without regard to case if nothing else matches. If several rows with different
    labels match equally well, none applies.
    """

    def __init__(self, path: Path) -> None:
        self._labels: dict[str, str] = {}
        self._files: dict[str, str] = {}  # as written
        for key, file, label in _read(path):
            self._labels[key] = label
            self._files[key] = file
        self._used: set[str] = set()
        self._indexes: dict[tuple[int, bool], dict[str, str]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def identity(self) -> str:
        rows = sorted((key, class_name(label)) for key, label in self._labels.items())
        return hashlib.sha256(repr(rows).encode("utf-8", "surrogatepass")).hexdigest()

    def find(self, name: str, is_archive: bool) -> str | None:
        """The label of a file as it is written, None if no row applies.

        Args:
            is_archive: whether the first part of the name is not a folder.
        """
        for spelling in dict.fromkeys((name, printable(name))):  # rows may have been copied from rejected.csv
            key = self._key(comparable(spelling).split("/"), is_archive)
            if key is not None:
                self._used.add(key)
                return self._labels[key]
        return None

    def _key(self, parts: Sequence[str], is_archive: bool) -> str | None:
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        ends = tails[is_archive:][:1]  # of longer paths
        for fold in (False, True):
            whole = self._index(0, fold)
            for tail in tails:
                if key := whole.get(tail.casefold() if fold else tail):
                    return key
            for end in ends:
                if key := self._index(end.count("/") + 1, fold).get(end.casefold() if fold else end):
                    return key
        return None

    def _index(self, num_parts: int, fold: bool) -> dict[str, str]:
        """{the last parts of a row's ``file``, or all for 0: its key; "" if rows with different labels have it}"""
        if (num_parts, fold) not in self._indexes:
            index: dict[str, str] = {}
            for key, label in self._labels.items():
                end = "/".join(key.split("/")[-num_parts:])
                end = end.casefold() if fold else end
                other = index.setdefault(end, key)
                if other and class_name(self._labels[other]) != class_name(label):
                    index[end] = ""
            self._indexes[num_parts, fold] = index
        return self._indexes[num_parts, fold]

    def unused(self) -> list[str]:
        """The files, as they are written, of the rows that ``find`` has not returned."""
        return [file for key, file in self._files.items() if key not in self._used]


def _read(path: Path) -> Iterator[tuple[str, str, str]]:
    """(file in the form to compare, file and label as they are written) of each row. Raises UserError."""
    try:
        text, is_utf = _decode(path.read_bytes())
        rows, header = None, ""
        for delimiter in _DELIMITERS:
            rows = _rows(text, delimiter)
            _, first = next(rows, (0, []))
            if [cell.strip().casefold() for cell in first] == _HEADER:
                break
            header = header or ",".join(first)
        else:
            raise UserError(f"{path} begins with {printable(header)[:80]!r}: the first line has to be file,label")
        if not is_utf:
            say(f"{path} is not UTF-8: read as Windows-1252")
        yield from _checked(rows, path)
    except (OSError, csv.Error, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot read {path}: {reason} (--labels takes `{FOLDER}` or a CSV file)") from None


def _checked(rows: Iterator[tuple[int, list[str]]], path: Path) -> Iterator[tuple[str, str, str]]:
    lines: dict[str, int] = {}
    for line, row in rows:
        key = comparable(row[0])
        if len(row) != 2 or not key or not class_name(row[1]):
            raise UserError(f"{path}, line {line}: give a file and a label, not {printable(','.join(row))!r}")
        if "\n" in row[1].strip() or "\r" in row[1].strip():
            raise UserError(f"{path}, line {line}: a label with a line break, is a quotation mark missing before?")
        if key in lines:
            raise UserError(f"{path}, line {line}: {printable(row[0])} is listed twice, first in line {lines[key]}")
        lines[key] = line
        yield key, row[0], row[1]


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line number and the cells of each row that is not empty, without empty cells at its end."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    for row in rows:
        while row and not row[-1].strip():
            row.pop()
        if row:
            yield rows.line_num, row


def _decode(data: bytes) -> tuple[str, bool]:
    """Text in one of the encodings of a ``_Table``, and whether it is not the last."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding), True
    if 0 in data[:2]:  # the header is ASCII, of which UTF-16 has every other byte
        return data.decode("utf-16-le" if data[0] else "utf-16-be"), True
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return decode_text(data), False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(printable(name)) for name in names[:_SHOWN]) + more
