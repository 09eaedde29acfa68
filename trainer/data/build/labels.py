"""The class of each image, from its folder or from a table."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path, PurePosixPath

from catgan.command import UserError

FOLDER = "folder"


class Labels:
    """The labels of a data set.

    Args:
        given: ``"folder"`` to label each file with the name of its folder, or the path of a CSV file with the header
            ``file,label``. A row applies to the files whose name (as in ``rejected.csv``) equals its ``file`` or ends
            with ``/`` and its ``file``; if several rows apply, the longest ``file`` wins.

    Raises:
        UserError: the CSV file cannot be read, has another header, an empty field, or lists a file twice.
    """

    def __init__(self, given: str | Path) -> None:
        self._table: dict[str, str] | None = None if given == FOLDER else _read(Path(given))

    @property
    def identity(self) -> str:
        """Equal for equal labels: a SHA-256 (hex) of the table, or ``"folder"``."""
        if self._table is None:
            return FOLDER
        return hashlib.sha256(repr(sorted(self._table.items())).encode("utf-8", "surrogatepass")).hexdigest()

    def of(self, name: str, kind: str) -> str | None:
        """The label of the file ``name`` in a source of this ``kind`` (see ``sources.Source``); None if it has none."""
        parts = PurePosixPath(name).parts
        if self._table is None:
            # The first part of a name in an archive is the archive itself, which is not a folder.
            folders = parts[:-1] if kind == "folder" else parts[1:-1] if kind in ("zip", "tar") else ()
            return _printable(folders[-1]) if folders else None
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((self._table[tail] for tail in tails if tail in self._table), None)


def _read(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            if (header := next(rows, None)) != ["file", "label"]:
                raise UserError(f"{path} begins with {','.join(header or ())!r}: the first line has to be file,label")
            for row in filter(None, rows):
                if len(row) != 2 or not all(row):
                    raise UserError(f"{path}, line {rows.line_num}: give a file and a label, not {','.join(row)!r}")
                name = str(PurePosixPath(row[0]))
                if name in table:
                    raise UserError(f"{path}, line {rows.line_num}: {row[0]} is listed twice")
                table[name] = _printable(row[1])
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error} (--labels takes `{FOLDER}` or a CSV file)") from None
    return table


def _printable(label: str) -> str:
    """``label`` with bytes that are not UTF-8, which file names may hold, as escapes."""
    return label.encode("utf-8", "backslashreplace").decode()
