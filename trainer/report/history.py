"""What a run's folder records of its training: ``config.json``, ``metrics.jsonl`` and the records for MLflow."""

from __future__ import annotations

import json
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

_METRIC = re.compile(r"(fid|fd|kid)\d+k?(_\w+)?")


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
    def opened(self) -> Record:
        """The latest ``open`` record, which describes the run."""
        return next((r for r in reversed(self.records) if r["kind"] == "open"), {"kind": "open"})

    @property
    def kimg(self) -> float:
        """Thousands of images seen."""
        return float(self.metrics[-1]["kimg"]) if self.metrics else 0.0

    @property
    def seconds(self) -> float:
        """Time from the first to the last record, without the time between an interruption and its continuation."""
        steps = pairwise(self.records)
        return sum(after["time"] - before["time"] for before, after in steps if after["kind"] != "open") / 1000

    @property
    def metric_names(self) -> list[str]:
        """Names of the distances between real and generated images, the latest first: it chooses the best generator."""
        names = [name for row in reversed(self.metrics) for name in row if _METRIC.fullmatch(name)]
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
                found |= {(name, record["nimg"]): settings for name in record["values"] if _METRIC.fullmatch(name)}
        return found

    def series(self, name: str) -> Series:
        """The values of ``name`` over kimg."""
        return Series(name, [(row["kimg"], row[name]) for row in self.metrics if name in row])


def read(folder: Path, status: str | None = None) -> History:
    """Read the history of the run in ``folder``. An incomplete last line, as a killed writer leaves it, is ignored.

    Args:
        status: how the run ended, if that is not recorded yet.

    Raises:
        UserError: ``folder`` is not a run, or has a damaged file.
    """
    names = ("config.json", "metrics.jsonl", "outbox.jsonl")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} is not a run: it has none of {', '.join(names)}; give a folder of out/runs")
    try:
        records = list(Journal(folder / "outbox.jsonl").records())
        metrics = list(Journal(folder / "metrics.jsonl").records())
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: one of {', '.join(names)} is damaged ({error})") from error
    last = next((r for r in reversed(records) if r["kind"] in ("open", "status")), {})
    return History(folder, config, metrics, records, status or last.get("status"))
