"""What the folder of a run tells of its training: ``config.json``, ``metrics.jsonl`` and the records for MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from catgan.command import UserError
from trainer.report.charts import Series
from trainer.tracking.journal import Journal, Record

_METRIC = re.compile(r"(fid|fd|kid)\d+k?(_\w+)?")


@dataclass(frozen=True)
class History:
    """What a run's folder tells."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Record]
    records: Sequence[Record]
    status: str | None
    problems: list[str] = field(default_factory=list)

    @property
    def opened(self) -> Record:
        """How the run was described last."""
        return next((r for r in reversed(self.records) if r["kind"] == "open"), {"kind": "open"})

    @property
    def kimg(self) -> float:
        return float(self.metrics[-1]["kimg"]) if self.metrics else 0.0

    @property
    def seconds(self) -> float:
        """From the first to the last sign of life, without the time between an interruption and the continuation."""
        steps = pairwise(self.records)
        return sum(after["time"] - before["time"] for before, after in steps if after["kind"] != "open") / 1000

    @property
    def metric_names(self) -> list[str]:
        """Of the distances from real pictures, the latest first: it is what chooses the best generator."""
        names = [name for row in reversed(self.metrics) for name in row if _METRIC.fullmatch(name)]
        return list(dict.fromkeys(names))

    def best(self, name: str) -> Record | None:
        """The row with the lowest ``name``."""
        rows = [row for row in self.metrics if row.get(name) is not None]
        return min(rows, key=lambda row: row[name], default=None)

    def series(self, name: str) -> Series:
        return Series(name, [(row["kimg"], row[name]) for row in self.metrics if name in row])


def read(folder: Path, status: str | None = None) -> History:
    """The history of the run in ``folder``, whose end may not be on record yet: then ``status`` tells it.

    Raises:
        UserError: not a run, or a damaged file. A torn last line is none: a killed writer leaves one.
    """
    names = ("config.json", "metrics.jsonl", "outbox.jsonl")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder}: no run, it holds none of {', '.join(names)}; give a folder of out/runs")
    try:
        records = [record for record, _ in Journal(folder / "outbox.jsonl").read()]
        metrics = [record for record, _ in Journal(folder / "metrics.jsonl").read()]
        config = json.loads(_content(folder / "config.json") or "{}")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: a damaged file among {', '.join(names)} ({error})") from error
    last = next((r for r in reversed(records) if r["kind"] in ("open", "status")), {})
    return History(folder, config, metrics, records, status or last.get("status"))


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
