"""How each kind of record gets into MLflow, such that sending it again changes nothing.

Points (``outbox`` describes the two lanes):

- ``open``: the run is created with the tag ``catgan.run`` and found by it again; params, tags and the data set are set.
- ``scalars``: points keep the time they were logged at; MLflow stores equal points (key, step, time, value) once.
- ``note``: a tag is set.
- ``status``: the run's status and end time are set.

Files:

- ``grid``, ``artifact``: files keep their names, so sending one again replaces it.
- ``note``: ``events.txt`` is written from all notes.
- ``model``: the version is found again by the hash of its file, see ``Register``.
- ``checkpoint``: logged models are made to agree with the latest record, see ``models``. It has no file, and is in this
  lane so that no metric waits for it.

All requests go through ``MlflowClient`` with an explicit run id: the fluent API keeps the active run in thread-local
state and is neither thread-safe nor made for a run that several processes write in turn (mlflow#11782).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from catgan.command import say
from infer.files import encode, load
from trainer.tracking.journal import Record
from trainer.tracking.messages import brief
from trainer.tracking.models import CheckpointModels
from trainer.tracking.outbox import DeliveryState, Outbox, Refused, describe_refused
from trainer.tracking.server import (
    connect,
    find_experiment,
    find_run,
    mlflow_errors,
    server_name,
)
from trainer.tracking.sweeps import PARENT_OF_RUN, find_parent

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.exceptions import MlflowException

Register = Callable[[str, str, str, Path, Mapping[str, Any]], Any]
"""Registers a generator: (tracking URI, run id, model name, ONNX file, info) -> version. Registering the same file of
the same run again must return the same version."""

_RUN_TAG = "catgan.run"
_DATA_TAG = "catgan.data"
_PARENT_TAG = "catgan.trainings_on"
_REFUSED_TAG = "catgan.refused_files"
_DESCRIPTION = "mlflow.note.content"
_IMAGE_LINK = r"!\[[^\]]*\]\(get-artifact\?[^)\s]*\)"
_ANIMATION = ".gif"

_MAX_TRAININGS_AT_ONCE = 20  # that may start before one of them creates the parent run

# MLflow's own limits (mlflow/utils/validation.py).
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000

_THUMBNAIL = 256  # pixels


class _UnusableFile(Exception):
    """A file to send is missing or damaged."""


class Delivery:
    """Sends the records of one run to MLflow."""

    def __init__(self, run_dir: Path, uri: str, *, register: Register) -> None:
        """Connects to MLflow at ``uri``. Paths in records are relative to ``run_dir``."""
        self._run_dir, self._uri, self._register = run_dir, uri, register
        self._outbox = Outbox(run_dir)
        self._client = connect(uri)
        self._points: dict[str, Callable[[Record, DeliveryState], None]] = {
            "open": self._open,
            "note": self._note,
            "status": self._status,
        }
        self._files: dict[str, Callable[[Record, str], None]] = {
            "grid": self._grid,
            "artifact": self._artifact,
            "note": self._events,
            "model": self._model,
            "checkpoint": self._checkpoint,
        }
        self._models = CheckpointModels(self._outbox.journal)

    def deliver_points(self) -> None:
        """Deliver all queued points.

        Raises:
            UserError: MLflow does not have the run.
            OSError: see ``Outbox.deliver_points``.
            Exception: see ``mlflow_errors``.
        """
        self._outbox.deliver_points(self._send_points)

    def deliver_files(self, patient: bool = False) -> float | None:
        """Deliver queued and refused files, see ``Outbox.deliver_files``. The tag ``catgan.refused_files`` names those
        that are still refused.

        Raises:
            As ``deliver_points``.
        """
        before = self._outbox.refused_files()
        pause = self._outbox.deliver_files(self._send_file, patient)
        refused = self._outbox.refused_files()
        if [entry["file"] for entry in refused] != [entry["file"] for entry in before]:
            text = describe_refused(refused) if refused else "none"
            self._client.set_tag(self._outbox.state()["run_id"], _REFUSED_TAG, text, synchronous=True)
        return pause

    def _send_points(self, records: Sequence[Record], state: DeliveryState) -> int:
        """Send the first record, or all leading ``scalars`` that fit into one request; see ``outbox.Send``.

        A record that MLflow rejects for its content is skipped with a warning, so that it does not block the others; of
        several values only those that are rejected.
        """
        from mlflow.exceptions import MlflowException

        batch = _leading_scalars(records) or records[:1]
        first = batch[0]
        try:
            if first["kind"] == "scalars":
                self._scalars(batch, state)
            else:
                self._points[first["kind"]](first, state)
        except MlflowException as error:
            if not _is_rejection(error) or "run_id" not in state:
                raise
            find_run(self._client, self._uri, state["run_id"])  # MLflow rejects all records of a deleted run
            if len(batch) > 1:
                return self._send_points(batch[:1], state)  # one by one, to skip only the one that is rejected
            if len(first.get("values", ())) > 1:
                for key, value in first["values"].items():
                    self._send_points([first | {"values": {key: value}}], state)
            else:
                self._say_skipped(first, error)
        return len(batch)

    def _send_file(self, record: Record, run_id: str) -> None:
        """Send the file of a record, see ``outbox.SendFile``. One that cannot be used, or whose name MLflow rejects, is
        skipped with a warning."""
        from mlflow.exceptions import MlflowException

        try:
            self._files[record["kind"]](record, run_id)
            return
        except _UnusableFile as error:
            self._say_skipped(record, error)
            return
        except mlflow_errors() as error:
            failure = error
        find_run(self._client, self._uri, run_id)  # raises if the tracking server, too, is away, or the run was deleted
        if not (isinstance(failure, MlflowException) and _is_rejection(failure)):
            raise Refused(brief(failure)) from failure
        self._say_skipped(record, failure)

    def _say_skipped(self, record: Record, error: Exception) -> None:
        what = record.get("path") or ", ".join(record.get("values", ()))
        text = f"a record of kind {record['kind']}" + (f" ({what})" if what else "")
        say(f"warning: {server_name(self._uri)}: skipped {text}: {brief(error)}")

    def _open(self, record: Record, state: DeliveryState) -> None:
        """Create or reopen the run and describe it. MLflow cannot change a param: a new value becomes the tag
        ``resumed.<param>``."""
        from mlflow.entities import Param, RunTag

        client = self._client
        run_id = state["run_id"] if "run_id" in state else self._create_run(record)
        run = find_run(client, self._uri, run_id)
        known = run.data.params
        client.update_run(run_id, status="RUNNING")
        params = record["params"]
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH])
        changed = {f"resumed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in (record["tags"] | changed).items()])
        client.log_inputs(run_id, [_dataset_input(record)])
        state["run_id"] = run_id
        if "sweep" in record:
            parent = find_parent(client, run.info.experiment_id, record["sweep"], record["user"])
            client.set_tag(run_id, PARENT_OF_RUN, parent, synchronous=True)
            client.set_tag(run_id, _DATA_TAG, record["dataset"]["digest"], synchronous=True)
        else:
            self._add_to_parent(run, record)

    def _create_run(self, record: Record) -> str:
        """The id of the run with the record's tag, created if there is none."""
        from mlflow.entities import ViewType

        experiment_id = find_experiment(self._client, self._uri, record["experiment"])
        condition = f"tags.`{_RUN_TAG}` = '{record['run']}'"
        for run in self._client.search_runs([experiment_id], condition, ViewType.ALL, max_results=1):
            return str(run.info.run_id)
        tags = {_RUN_TAG: record["run"], "mlflow.user": record["user"], "mlflow.source.name": "trainer/run.py"}
        run = self._client.create_run(experiment_id, record["time"], tags, run_name=record["name"])
        return str(run.info.run_id)

    def _add_to_parent(self, run: Run, record: Record) -> None:
        """Make trainings on the same data children of one run named after the data, to compare their metrics.

        The second training creates the parent. A parent that a user has set is kept.
        """
        from mlflow.entities import RunStatus

        client, digest, experiment = self._client, record["dataset"]["digest"], run.info.experiment_id
        client.set_tag(run.info.run_id, _DATA_TAG, digest, synchronous=True)

        def oldest(tag: str) -> list[Run]:
            condition, order = f"tags.`{tag}` = '{digest}'", ["attributes.start_time ASC"]
            return list(client.search_runs([experiment], condition, max_results=_MAX_TRAININGS_AT_ONCE, order_by=order))

        trainings, parents = [run], oldest(_PARENT_TAG)
        if not parents:
            trainings = oldest(_DATA_TAG)
            if len(trainings) < 2:
                return
            tags = {_PARENT_TAG: digest, "mlflow.user": record["user"], "mlflow.source.name": "trainer/run.py"}
            name = f"{record['dataset']['name']} {digest[:8]}"
            own = client.create_run(experiment, record["time"], tags, run_name=name)
            parents = oldest(_PARENT_TAG)
            if parents[0].info.run_id != own.info.run_id:  # two trainings that start at the same time both create one
                client.delete_run(own.info.run_id)
        parent = parents[0].info
        if parent.status != RunStatus.to_string(RunStatus.FINISHED):
            client.log_inputs(parent.run_id, [_dataset_input(record)])
            client.set_terminated(parent.run_id)
        for training in trainings:
            if PARENT_OF_RUN not in training.data.tags:
                client.set_tag(training.info.run_id, PARENT_OF_RUN, parent.run_id, synchronous=True)

    def _scalars(self, records: Sequence[Record], state: DeliveryState) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), record["time"], record["nimg"] // 1000)
            for record in records
            for key, value in record["values"].items()
        ]
        self._client.log_batch(state["run_id"], metrics=points, synchronous=True)

    def _grid(self, record: Record, run_id: str) -> None:
        """Log an image for the UI's image view, as ``MlflowClient.log_image`` does, but under a name that is the same
        each time. The UI parses these names; one other file in ``images/`` hides them all (mlflow#24789)."""
        key, step = record["key"], record["nimg"] // 1000
        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id}/{key}/{record['nimg']}")
        name = f"{key}+step+{step}+timestamp+{record.get('shown_as', record['time'])}+{unique}"
        path = self._file(record)
        try:
            image = load(path)
        except ValueError as error:
            raise _UnusableFile(f"{path} is not an image") from error
        with tempfile.TemporaryDirectory() as scratch:
            full, small = Path(scratch, f"{name}.png"), Path(scratch, f"{name}+compressed.webp")
            xmp = image.info.get("xmp")  # says of generated images that they are
            full.write_bytes(encode(np.asarray(image), ".png", xmp))
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            image.save(small, xmp=xmp or b"")
            for version in (full, small):
                self._client.log_artifact(run_id, str(version), "images")
        self._client.set_tag(run_id, "mlflow.loggedImages", True, synchronous=True)
        self._show_on_run_page(run_id, f"samples/{Path(record['path']).name}", f"{key} at {step} kimg")

    def _artifact(self, record: Record, run_id: str) -> None:
        path = self._file(record)
        self._client.log_artifact(run_id, str(path), record["folder"])
        if path.suffix == _ANIMATION:
            self._show_on_run_page(run_id, f"{record['folder']}/{path.name}", "the whole training")

    def _show_on_run_page(self, run_id: str, path: str, text: str) -> None:
        """Make the latest grid and the animation, artifacts at ``path``, the description on the run's page; its charts
        show grids only far below the run's options. A description that a user has written is kept."""
        old = self._client.get_run(run_id).data.tags.get(_DESCRIPTION, "")
        if re.fullmatch(rf"({_IMAGE_LINK}\s*)*", old) is None:
            return
        new = f"![{text}](get-artifact?path={quote(path, safe='')}&run_uuid={run_id})"
        grids = [link for link in re.findall(_IMAGE_LINK, old) if path.endswith(_ANIMATION) and _ANIMATION not in link]
        self._client.set_tag(run_id, _DESCRIPTION, " ".join([*grids, new]), synchronous=True)

    def _note(self, record: Record, state: DeliveryState) -> None:
        """Set a tag to the latest note of its kind."""
        self._client.set_tag(state["run_id"], f"note.{record['note']}", _text(record), synchronous=True)

    def _events(self, record: Record, run_id: str) -> None:
        """Write all notes to ``events.txt``."""
        notes = (note for note in self._outbox.journal.records() if note["kind"] == "note")
        lines = []
        for note in notes:
            at = datetime.datetime.fromtimestamp(note["time"] / 1000, datetime.UTC)
            lines.append(f"{at:%Y-%m-%d %H:%M:%S} UTC  {note['note']}  {_text(note)}\n")
        self._client.log_text(run_id, "".join(lines), "events.txt")

    def _model(self, record: Record, run_id: str) -> None:
        name, path = record["name"], self._file(record)
        if "sha256" in record and record["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            raise _UnusableFile(f"a later {path.name} has replaced it")
        version = self._register(self._uri, run_id, name, path, record["info"])
        say(f"registered as models:/{name}/{version}")
        self._models.update(self._client, run_id)  # the exported generator takes the place of the best one

    def _checkpoint(self, record: Record, run_id: str) -> None:
        self._models.update(self._client, run_id)

    def _status(self, record: Record, state: DeliveryState) -> None:
        self._client.set_terminated(state["run_id"], record["status"], end_time=record["time"])

    def _file(self, record: Record) -> Path:
        path = self._run_dir / record["path"]
        if not path.is_file():
            raise _UnusableFile(f"{path} does not exist")
        return path


def _is_rejection(error: MlflowException) -> bool:
    """Whether MLflow rejects what was sent, so that sending it again is of no use."""
    return error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _text(note: Record) -> str:
    return f"{note['nimg'] / 1000:g} kimg: {note['text']}"


def _leading_scalars(records: Sequence[Record]) -> list[Record]:
    """The ``scalars`` at the beginning of ``records``, as many as fit into one request."""
    batch: list[Record] = []
    count = 0
    for record in takewhile(lambda r: r["kind"] == "scalars", records):
        count += len(record["values"])
        if batch and count > _METRICS_PER_BATCH:
            break
        batch.append(record)
    return batch


def _dataset_input(record: Record) -> Any:
    """The data set of an ``open`` record as an input of an MLflow run."""
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
