"""What is known of a sweep: its trials, their distances, how they ended. Kept in ``sweep.jsonl`` in the sweep's folder.

The file is a journal of events. Reading them again gives the state in which a killed sweep was.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from catgan.command import UserError
from catgan.location import retry
from trainer.checkpoints.storage import Bucket, Storage
from trainer.config import Config
from trainer.launch.options import differences, texts
from trainer.sweeps.space import Value
from trainer.tracking.journal import Journal, Record

Status = Literal["waiting", "running", "done", "stopped", "failed"]
"""stopped: by the scheduler, since others were better at a rung."""

_JOURNAL = "sweep.jsonl"
_REPLACED = "sweep.replaced.jsonl"


@dataclass(frozen=True)
class Point:
    """A distance from the real images, measured at ``kimg``."""

    kimg: float
    value: float
    error: float | None
    """Standard error due to the sample of generated images, where it was computed."""


@dataclass
class Trial:
    """One configuration with one seed: a run of this name in the sweep's folder."""

    name: str
    values: dict[str, Value]
    seed: int
    of: str | None = None
    """The trial whose configuration this one repeats with another seed."""
    status: Status = "waiting"
    message: str = ""
    points: dict[float, Point] = field(default_factory=dict)
    started: float | None = None
    """Time at which this process began to train it, and ``kimg`` then."""
    started_at: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "stopped", "failed")

    @property
    def last(self) -> Point | None:
        return self.points[max(self.points)] if self.points else None

    @property
    def kimg(self) -> float:
        return max(self.points, default=0.0)

    @property
    def error(self) -> float:
        """The metric's own standard error: the latest that was measured, 0 if none was."""
        errors = [point.error for _, point in sorted(self.points.items()) if point.error is not None]
        return errors[-1] if errors else 0.0

    def seconds_left(self, kimg: float) -> float | None:
        """Estimated time until ``kimg``; None if it is not known yet."""
        done = self.kimg - self.started_at
        if self.status != "running" or self.started is None or done <= 0:
            return None
        return (kimg - self.kimg) * (time.monotonic() - self.started) / done


@dataclass(frozen=True)
class Rungs:
    """ASHA's rungs, in kimg."""

    first: float
    reduction: float
    last: float

    @property
    def kimg(self) -> list[float]:
        """Where trials are compared, and all but the best are stopped."""
        count = math.ceil(math.log(self.last / self.first) / math.log(self.reduction) - 1e-9)
        return [self.first * self.reduction**i for i in range(max(count, 0))]

    def reached(self, kimg: float, snapshot_kimg: float) -> float | None:
        """The last rung that a trial has reached at ``kimg``, None at the end and before the first.

        An evaluation counts if it is at most half a snapshot before the rung: snapshots are whole numbers of steps, so
        that the one meant for the rung may be just below it, and the next one is far away.
        """
        if kimg >= self.last:
            return None
        return max((rung for rung in self.kimg if kimg >= rung - snapshot_kimg / 2 - 1e-9), default=None)


class Ledger:
    """The trials of one sweep, and the journal that remembers them."""

    def __init__(self, storage: Storage, settings: Mapping[str, str]) -> None:
        """Reads the journal; writes nothing.

        Args:
            storage: the sweep's folder.
            settings: what has to be the same when a sweep is continued.

        Raises:
            UserError: the folder cannot be read, is something else, or is a sweep with other settings.
        """
        self.storage, self.settings = storage, dict(settings)
        self.trials: dict[str, Trial] = {}
        self.metric: str | None = None
        self.id: str | None = None
        self._journal = Journal(storage.work / _JOURNAL)
        self._pull()
        try:
            for record in self._journal.records():
                self._apply(record)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{storage.join(_JOURNAL)} is damaged ({error}); give another --name") from error
        for trial in self.trials.values():
            if trial.status not in ("done", "stopped"):  # a failure may have been repaired
                trial.status, trial.message = "waiting", ""
        if self.id is None and storage.checkpoints():
            raise UserError(f"{storage.location} is a run, not a sweep; give another --name")

    def open(self, sweep_id: str) -> None:
        """Begin the journal of a new sweep."""
        if self.id is None:
            self._record({"kind": "open", "id": sweep_id, "settings": self.settings})
            if self._journal.has_unwritten:
                raise UserError(f"{self._journal.path} cannot be written; free some space, or give another --out")

    def add(self, trial: Trial) -> Trial:
        """A trial is planned. Returns it as the ledger has it."""
        self._record({"kind": "trial", "name": trial.name, "values": trial.values, "seed": trial.seed, "of": trial.of})
        return self.trials[trial.name]

    def measured(self, trial: str, metric: str, point: Point) -> None:
        """A distance was measured; one that is known, or has become known again, changes nothing."""
        if point.kimg not in self.trials[trial].points:
            error = {} if point.error is None else {"error": point.error}
            record = {"kind": "point", "name": trial, "kimg": point.kimg, "value": point.value, "metric": metric}
            self._record(record | error)

    def ended(self, trial: str, status: Status, message: str = "") -> None:
        """A trial is over."""
        self._record({"kind": "end", "name": trial, "status": status, "message": message})
        self.push()

    def write(self, name: str, data: bytes) -> None:
        """Write a file into the sweep's folder. Raises OSError."""
        self.storage.write(name, data)
        self._put(name, data)

    def push(self) -> None:
        """Upload the journal of a sweep in a bucket. A bucket that refuses it gets it the next time."""
        if self._journal.path.is_file():
            with contextlib.suppress(OSError):
                self._put(_JOURNAL, self._journal.path.read_bytes())

    def _put(self, name: str, data: bytes) -> None:
        if isinstance(storage := self.storage, Bucket):
            path = f"{storage.path}/{name}"
            retry(lambda: storage.filesystem.pipe_file(path, data), path, tries=3)

    def _pull(self) -> None:
        """Fetch the journal of a sweep in a bucket, unless the one here goes on from it, since it was not uploaded
        completely. Any other one here, of a sweep that was deleted or has gone on elsewhere, is kept under another
        name."""
        if not isinstance(storage := self.storage, Bucket):
            return
        path = f"{storage.path}/{_JOURNAL}"
        try:
            there: bytes = retry(lambda: storage.filesystem.cat_file(path), path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{storage.location} cannot be read ({error})") from error
        here = self._journal.path
        if here.is_file():
            known = here.read_bytes()
            if known.startswith(there):
                return
            if not there.startswith(known):
                here.replace(here.with_name(_REPLACED))
        storage.write(_JOURNAL, there)

    def _record(self, record: Record) -> None:
        self._journal.append(record)
        self._apply(record)

    def _apply(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "open":
            self.id = record["id"]
            # An option that this version has and the one that began the sweep had not: its default.
            was, now = texts(Config(recipe="")) | record["settings"], self.settings
            if changed := differences(was, now):
                raise UserError(
                    f"{self.storage.location} is a sweep with other options ({changed}); give the same ones to"
                    " continue it, or another --name"
                )
        elif record["kind"] == "trial":
            values = {str(key): str(value) for key, value in record["values"].items()}
            self.trials[record["name"]] = Trial(record["name"], values, int(record["seed"]), record["of"])
        elif record["kind"] == "point":
            point = Point(float(record["kimg"]), float(record["value"]), record.get("error"))
            self.trials[record["name"]].points[point.kimg] = point
            self.metric = record["metric"]
        elif record["kind"] == "end":
            trial = self.trials[record["name"]]
            trial.status, trial.message = record["status"], record["message"]
