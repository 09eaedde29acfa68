"""How each record of a training's outbox gets into MLflow, so that one that comes twice changes nothing.

That holds for points because each keeps the time it was recorded at: MLflow stores a point with the same key, step,
time and value once. Runs, models and versions carry a tag by which they are found again. Files and pictures have the
same names each time. Everything else is set, not added.

Everything goes through ``MlflowClient`` with an explicit run id: MLflow's fluent API keeps the active run in
thread-local state and is neither thread-safe nor fit for a run that several processes take turns to write
(mlflow#11782).
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import uuid
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image

from catgan.command import say
from trainer.tracking.journal import Record
from trainer.tracking.outbox import Memo, brief, redact
from trainer.tracking.server import find_run, sqlite_path

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN_TAG = "catgan.run"
"""Finds the run of MLflow that belongs to a training."""

_DATA_TAG = "catgan.data"
_PARENT_TAG = "catgan.trainings_on"
_DESCRIPTION = "mlflow.note.content"
_PICTURE = r"!\[[^\]]*\]\(get-artifact\?[^)\s]*\)"
_FILM = ".gif"

_PARENT = "mlflow.parentRunId"  # what MLflow's UI nests runs by
_AT_ONCE = 20  # trainings that may begin together before one of them makes the parent

# MLflow's own limits (mlflow/utils/validation.py).
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000

_THUMBNAIL = 256


class _Gone(Exception):
    """A file that was to be sent is no longer there, or broken."""


class Delivery:
    """Sends the records of the training in ``folder``; its ``send`` is what an ``Outbox`` asks for.

    The memo holds ``run_id``, MLflow's id of the run, as soon as there is one, and ``notes``, the lines of
    ``events.txt`` so far.
    """

    def __init__(self, client: MlflowClient, uri: str, folder: Path) -> None:
        self._client, self._uri, self._folder = client, uri, folder
        self._handlers: dict[str, Callable[[Record, Memo], None]] = {
            "open": self._open,
            "grid": self._grid,
            "artifact": self._artifact,
            "note": self._note,
            "model": self._model,
            "status": self._status,
        }

    def send(self, records: Sequence[Record], memo: Memo) -> int:
        """One record, or several with points in one request. One that MLflow refuses for its content, or whose file
        is gone, is left out with a warning, so that it does not keep the others back.

        Raises:
            UserError: the run is not there.
            MlflowException, SQLAlchemyError, OSError: see ``failures``.
        """
        from mlflow.exceptions import MlflowException

        batch = _leading_points(records) or records[:1]
        kind = batch[0]["kind"]
        try:
            if kind == "scalars":
                self._scalars(batch, memo)
            else:
                self._handlers[kind](batch[0], memo)
        except (MlflowException, _Gone) as error:
            if isinstance(error, MlflowException):
                if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") or "run_id" not in memo:
                    raise
                find_run(self._client, self._uri, memo["run_id"])  # it refuses everything for a deleted run
            if len(batch) > 1:
                return self.send(batch[:1], memo)  # which of them is it?
            say(f"warning: MLflow at {redact(self._uri)} goes without a record of kind {kind}: {brief(error)}")
        return len(batch)

    def _open(self, record: Record, memo: Memo) -> None:
        """The run and its description. A param cannot change in MLflow: another value becomes a tag ``resumed.*``."""
        from mlflow.entities import Param, RunTag

        client = self._client
        run_id = memo["run_id"] if "run_id" in memo else self._create_run(record)
        run = find_run(client, self._uri, run_id)
        known = run.data.params
        client.update_run(run_id, status="RUNNING")
        params = record["params"]
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH])
        changed = {f"resumed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in (record["tags"] | changed).items()])
        client.log_inputs(run_id, [_input(record)])
        memo["run_id"] = run_id
        self._join(run, record)

    def _join(self, run: Run, record: Record) -> None:
        """Trainings on the same data are children of one run that is named after the data: their metrics can be
        compared. It is made for the second of them. A parent that somebody has chosen is left alone."""
        from mlflow.entities import RunStatus

        client, digest, experiment = self._client, record["dataset"]["digest"], run.info.experiment_id
        client.set_tag(run.info.run_id, _DATA_TAG, digest, synchronous=True)

        def eldest(tag: str) -> list[Run]:
            condition, order = f"tags.`{tag}` = '{digest}'", ["attributes.start_time ASC"]
            return list(client.search_runs([experiment], condition, max_results=_AT_ONCE, order_by=order))

        trainings, parents = [run], eldest(_PARENT_TAG)
        if not parents:
            trainings = eldest(_DATA_TAG)
            if len(trainings) < 2:
                return
            tags = {_PARENT_TAG: digest, "mlflow.user": record["user"], "mlflow.source.name": "trainer/run.py"}
            name = f"{record['dataset']['name']} {digest[:8]}"
            own = client.create_run(experiment, record["time"], tags, run_name=name)
            parents = eldest(_PARENT_TAG)
            if parents[0].info.run_id != own.info.run_id:  # two trainings that begin at once both make one
                client.delete_run(own.info.run_id)
        parent = parents[0].info
        if parent.status != RunStatus.to_string(RunStatus.FINISHED):
            client.log_inputs(parent.run_id, [_input(record)])
            client.set_terminated(parent.run_id)
        for training in trainings:
            if _PARENT not in training.data.tags:
                client.set_tag(training.info.run_id, _PARENT, parent.run_id, synchronous=True)

    def _create_run(self, record: Record) -> str:
        from mlflow.entities import ViewType

        experiment_id = self._experiment(record["experiment"])
        condition = f"tags.`{RUN_TAG}` = '{record['run']}'"
        for run in self._client.search_runs([experiment_id], condition, ViewType.ALL, max_results=1):
            return str(run.info.run_id)
        tags = {RUN_TAG: record["run"], "mlflow.user": record["user"], "mlflow.source.name": "trainer/run.py"}
        run = self._client.create_run(experiment_id, record["time"], tags, run_name=record["name"])
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        """Its id; created if it is new. Beside an SQLite file its artifacts go to ``mlartifacts``."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            database = sqlite_path(self._uri)
            location = None if database is None else str(database.parent / "mlartifacts")
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                # Another training may have created it in the meantime.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _scalars(self, records: Sequence[Record], memo: Memo) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), record["time"], record["nimg"] // 1000)
            for record in records
            for key, value in record["values"].items()
        ]
        self._client.log_batch(memo["run_id"], metrics=points, synchronous=True)

    def _grid(self, record: Record, memo: Memo) -> None:
        """A picture for the UI's image view: what ``MlflowClient.log_image`` does, under a name that is the same each
        time. The UI goes by these names; a foreign one in ``images/`` hides them all (mlflow#24789)."""
        run_id, key, step = memo["run_id"], record["key"], record["nimg"] // 1000
        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id}/{key}/{record['nimg']}")
        name = f"{key}+step+{step}+timestamp+{record['time']}+{unique}"
        path = self._existing(record)
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise _Gone(f"{path} is not a picture") from error
        with tempfile.TemporaryDirectory() as scratch:
            whole, small = Path(scratch, f"{name}.png"), Path(scratch, f"{name}+compressed.webp")
            image.save(whole)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            image.save(small)
            for version in (whole, small):
                self._client.log_artifact(run_id, str(version), "images")
        self._client.set_tag(run_id, "mlflow.loggedImages", True, synchronous=True)
        self._describe(memo, f"samples/{Path(record['path']).name}", f"{key} at {step} kimg")

    def _artifact(self, record: Record, memo: Memo) -> None:
        path = self._existing(record)
        self._client.log_artifact(memo["run_id"], str(path), record["folder"])
        if path.suffix == _FILM:
            self._describe(memo, f"{record['folder']}/{path.name}", "the whole training")

    def _describe(self, memo: Memo, path: str, text: str) -> None:
        """The latest grid and the film, which an artifact ``path`` of the run is, as the description on the run's page:
        its charts show grids far below the run's options. What somebody has written there is left alone."""
        run_id = memo["run_id"]
        own = self._client.get_run(run_id).data.tags.get(_DESCRIPTION, "")
        if re.fullmatch(rf"({_PICTURE}\s*)*", own) is None:
            return
        picture = f"![{text}](get-artifact?path={quote(path, safe='')}&run_uuid={run_id})"
        grids = [shown for shown in re.findall(_PICTURE, own) if path.endswith(_FILM) and _FILM not in shown]
        self._client.set_tag(run_id, _DESCRIPTION, " ".join([*grids, picture]), synchronous=True)

    def _note(self, record: Record, memo: Memo) -> None:
        """A tag with the latest note of its kind, and all of them in ``events.txt``."""
        at = datetime.datetime.fromtimestamp(record["time"] / 1000, datetime.UTC)
        what = f"{record['nimg'] / 1000:g} kimg: {record['text']}"
        notes = [*memo.get("notes", []), f"{at:%Y-%m-%d %H:%M:%S} UTC  {record['note']}  {what}"]
        self._client.set_tag(memo["run_id"], f"note.{record['note']}", what, synchronous=True)
        self._client.log_text(memo["run_id"], "".join(f"{line}\n" for line in notes), "events.txt")
        memo["notes"] = notes

    def _model(self, record: Record, memo: Memo) -> None:
        # Imported here since it takes ONNX, which only the end of a training needs.
        from export.registry import register

        name = record["name"]
        version = register(self._uri, memo["run_id"], name, self._existing(record), record["info"])
        say(f"registered as models:/{name}/{version}")

    def _status(self, record: Record, memo: Memo) -> None:
        self._client.set_terminated(memo["run_id"], record["status"], end_time=record["time"])

    def _existing(self, record: Record) -> Path:
        path = self._folder / record["path"]
        if not path.is_file():
            raise _Gone(f"{path} is not there")
        return path


def _leading_points(records: Sequence[Record]) -> list[Record]:
    """The records with points at the beginning, as many as fit into one request."""
    batch: list[Record] = []
    count = 0
    for record in takewhile(lambda r: r["kind"] == "scalars", records):
        count += len(record["values"])
        if batch and count > _METRICS_PER_BATCH:
            break
        batch.append(record)
    return batch


def _input(record: Record) -> Any:
    """The data set of an ``open`` record as MLflow's input of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    values = record["dataset"]
    data = Dataset(
        name=values["name"],
        digest=values["digest"],
        source_type="webdataset",
        source=json.dumps(values["source"]),
        profile=json.dumps(values["profile"]),
    )
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])
