"""What a run's folder records of its training: ``config.json``, ``metrics.jsonl`` and the records for MLflow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from catgan.command import UserError
from trainer.report.charts import Series
from trainer.tracking.journal import Journal, Record

_STATES = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
FILES = ("config.json", "metrics.jsonl", "outbox.jsonl")
"""The files of a run's folder that this module reads: a folder with none of them is not a run."""

# Keys of config.json that are not settings.
_NOT_SETTINGS = ("data", "dataset_digest", "mlflow_run_id", "tracking_uri")
METRIC = re.compile(r"(fid|fd|kid)\d+k?(_[\w-]+)?")
"""Names of metrics; a network with other weights than usual has a hash in its name: fd2k_inception-1a2b3c4d."""

_MAX_TIME = 253_402_300_799_000  # milliseconds: the end of the year 9999
_NUMBER = (int, float)
# What this module and the pages read of the records, by their kind.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "scalars": {"nimg": _NUMBER, "values": dict},
    "model": {"info": dict},
    "note": {"nimg": _NUMBER, "note": str, "text": str},
    "status": {"status": str},
}


@dataclass(frozen=True)
class History:
    """The records of one run."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Record]
    """Lines of ``metrics.jsonl``: ``nimg``, ``kimg`` and values by name, None for one that was not finite."""
    records: Sequence[Record]
    """All records for MLflow, see ``trainer.tracking.delivery``."""
    status: str | None
    """FINISHED, FAILED or KILLED; None while the run has not ended."""

    @property
    def state(self) -> str:
        """ "finished", "failed", "stopped", or "unfinished" for a run that is training or was interrupted."""
        return _STATES.get(self.status or "", "unfinished")

    @property
    def settings(self) -> dict[str, str]:
        """The settings by dotted name, such as "loss.name"."""
        return flatten({name: value for name, value in self.config.items() if name not in _NOT_SETTINGS})

    @property
    def opened(self) -> Record:
        """The latest ``open`` record, which describes the run."""
        return next((r for r in reversed(self.records) if r["kind"] == "open"), {"kind": "open"})

    @property
    def kimg(self) -> float:
        """Thousands of images seen."""
        return float(self.metrics[-1]["kimg"]) if self.metrics else 0.0

    @property
    def seconds(self) -> float:
        """Time from the first to the last record, without the time between an interruption and its continuation, and
        without steps of a clock that was set back."""
        steps = pairwise(self.records)
        return sum(max(after["time"] - before["time"], 0) for before, after in steps if after["kind"] != "open") / 1000

    @cached_property
    def hours(self) -> Mapping[int, float]:
        """Hours of training by position in images, for the values that have a record. Counted as ``seconds``; a
        position that was trained again after an interruption has the later time."""
        found: dict[int, float] = {}
        total, before = 0.0, None
        for record in self.records:
            if before is not None and record["kind"] != "open":
                total += max(record["time"] - before, 0) / 3.6e6
            before = record["time"]
            if record["kind"] == "scalars":
                found[record["nimg"]] = total
        return found

    @property
    def metric_names(self) -> list[str]:
        """Names of the distances between real and generated images, the latest first: it chooses the best generator."""
        names = [name for row in reversed(self.metrics) for name in row if METRIC.fullmatch(name)]
        return list(dict.fromkeys(names))

    def best(self, name: str) -> Record | None:
        """The row with the lowest ``name`` among those that were measured as the latest one: with as many generated
        images, on the same data."""
        rows = [row for row in self.metrics if row.get(name) is not None]
        same = [row for row in rows if self._measured(name, row) == self._measured(name, rows[-1])]
        return min(same, key=lambda row: row[name], default=None)

    def _measured(self, name: str, row: Record) -> tuple[object, object] | None:
        return self._settings.get((name, row["nimg"]))

    @cached_property
    def _settings(self) -> dict[tuple[str, int], tuple[object, object]]:
        """The number of generated images and the digest of the data with which a metric was measured, by its name and
        position."""
        found: dict[tuple[str, int], tuple[object, object]] = {}
        settings: tuple[object, object] = None, None
        for record in self.records:
            if record["kind"] == "open":
                settings = record.get("params", {}).get("eval.num"), record.get("dataset", {}).get("digest")
            elif record["kind"] == "scalars":
                found |= {(name, record["nimg"]): settings for name in record["values"] if METRIC.fullmatch(name)}
        return found

    def series(self, name: str) -> Series:
        """The values of ``name`` over kimg."""
        return Series(name, [(row["kimg"], row[name]) for row in self.metrics if name in row])

    def series_over_hours(self, name: str) -> Series:
        """The values of ``name`` over hours of training, without those of which the time is unknown."""
        rows = [row for row in self.metrics if name in row and row["nimg"] in self.hours]
        return Series(name, sorted(((self.hours[row["nimg"]], row[name]) for row in rows), key=lambda point: point[0]))


def read(folder: Path, status: str | None = None, location: str | None = None) -> History:
    """Read the history of the run in ``folder``. An incomplete last line, as a killed writer leaves it, is ignored.

    Args:
        status: how the run ended, if that is not recorded yet.
        location: the run's path or URL in messages (default: ``folder``).

    Raises:
        UserError: ``folder`` is not a run, or has a damaged file.
    """
    name = location or folder
    if not any((folder / file).is_file() for file in FILES):
        raise UserError(f"{name} is not a run: it has none of {', '.join(FILES)}; give a folder of out/runs")
    try:
        records = list(Journal(folder / "outbox.jsonl").records())
        metrics = list(Journal(folder / "metrics.jsonl").records())
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        _check(config, metrics, records)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: one of {', '.join(FILES)} is damaged ({error})") from error
    last = next((r for r in reversed(records) if r["kind"] in ("open", "status")), {})
    return History(folder, config, metrics, records, status or last.get("status"))


def _check(config: object, metrics: Sequence[object], records: Sequence[object]) -> None:
    """Raises ValueError for JSON that is none of a training's."""
    if not isinstance(config, dict):
        raise ValueError("config.json is no JSON object")
    for row in metrics:
        if not isinstance(row, dict) or not _has_numbers(row, "nimg", "kimg"):
            raise ValueError("metrics.jsonl has a line without nimg and kimg")
        if wrong := [name for name, value in row.items() if value is not None and not _has_numbers(row, name)]:
            raise ValueError(f"metrics.jsonl has a line in which {wrong[0]} is no number")
    for record in records:
        if not isinstance(record, dict) or not _has_numbers(record, "time") or not 0 <= record["time"] <= _MAX_TIME:
            raise ValueError("outbox.jsonl has a line without time")
        if not isinstance(record.get("kind"), str):
            raise ValueError("outbox.jsonl has a line without kind")
        for name, types in _FIELDS.get(record["kind"], {}).items():
            if not isinstance(record.get(name), types):
                raise ValueError(f"outbox.jsonl has a line of the kind {record['kind']} without {name}")


def _has_numbers(row: Mapping[str, Any], *names: str) -> bool:
    return all(type(row.get(name)) in (int, float) and math.isfinite(row[name]) for name in names)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name: ``{"a": {"b": [1, 2.0]}}`` -> ``{"a.b": "1 2.0"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = f"{value:g}" if type(value) in (int, float) else str(value)
    return flat
