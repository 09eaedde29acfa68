"""The checkpoints that a training keeps as logged models of its run in MLflow: name, step, tags and metric, no files.

A record ``checkpoint`` of the outbox names the checkpoint that was saved and those that are kept since then.
``CheckpointModels.update`` makes MLflow agree with the latest such record: it creates the models that are missing and
deletes those of checkpoints that are gone. So it does not matter how often a record is sent, and records that are
delivered late create no models that the next record would delete. At the end of a training its last record is queued
again, after the status: then the models become outputs of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.tracking.journal import Journal, Record

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.tracking import MlflowClient

BEST = "best/gen.safetensors"

_TAG = "catgan.checkpoint"


class CheckpointModels:
    """The logged models of one run's checkpoints, and of its best generator until that is exported or if no checkpoint
    has it."""

    def __init__(self, journal: Journal) -> None:
        """``journal`` is that of the run's outbox."""
        self._journal, self._end = journal, 0
        self._saved: dict[str, Record] = {}
        self._times: dict[tuple[str, int, float], int] = {}
        self._exported: float | None = None
        self._latest: Record | None = None
        self._ended = False

    def update(self, client: MlflowClient, run_id: str) -> None:
        """Make the models of the run ``run_id`` those of the checkpoints that are kept.

        Raises:
            Exception: see ``trainer.tracking.server.mlflow_errors``. The next call completes the update.
        """
        self._read()
        wanted = self._wanted()
        run = client.get_run(run_id)
        found: dict[str, LoggedModel] = {}
        for model in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
            path = model.tags.get(_TAG)
            if path is None:
                continue  # the exported generator
            if path in wanted and _tags(wanted[path]).items() <= model.tags.items():
                found[path] = model
            else:
                client.delete_logged_model(model.model_id)
        for path, record in wanted.items():
            model = self._completed(client, run, record, found.get(path))
            if self._ended:  # a run keeps deleted outputs, and MLflow's page of it asks for each
                link_output(client, run, model, int(record["kimg"]))

    def _completed(self, client: MlflowClient, run: Run, record: Record, model: LoggedModel | None) -> LoggedModel:
        """The model of a checkpoint, created or completed if it is not."""
        if model is not None and str(model.status) == "READY":
            return model
        metric, step, info = record["metric"], int(record["kimg"]), run.info
        if model is None:
            name = record["path"].partition("/")[0]
            model = client.create_logged_model(
                info.experiment_id, name, info.run_id, _tags(record), model_type="checkpoint"
            )
        if metric:
            time = self._times.get((metric["name"], round(record["kimg"] * 1000), metric["value"]))
            link_metric(client, run, model, metric, step, time)
        return client.finalize_logged_model(model.model_id, "READY")

    def _wanted(self) -> dict[str, Record]:
        """The latest record of each checkpoint, by its path in the run's folder, and one of the best generator."""
        latest = self._latest
        if latest is None:
            return {}
        wanted = {path: self._saved[path] for path in latest["kept"] if path in self._saved}
        best = latest["best"]
        if best and best["kimg"] not in {self._exported, *(record["kimg"] for record in wanted.values())}:
            wanted[BEST] = latest | {"path": BEST, "kimg": best["kimg"], "metric": best}
        return wanted

    def _read(self) -> None:
        """Read the records that are new in the journal."""
        new = []
        for record, end in self._journal.read(self._end):
            new.append(record)
            self._end = end
        for record in new:
            if record["kind"] == "checkpoint":
                self._saved[record["path"]] = self._latest = record
            elif record["kind"] == "model":
                self._exported = record["info"]["kimg"]
            elif record["kind"] in ("open", "status"):
                self._ended = record["kind"] == "status"
        metrics = {record["metric"]["name"] for record in self._saved.values() if record["metric"]}
        for record in new:
            if record["kind"] == "scalars":
                for name in metrics & record["values"].keys():
                    self._times[name, record["nimg"], record["values"][name]] = record["time"]


def link_output(client: MlflowClient, run: Run, model: LoggedModel, step: int) -> None:
    """Make a logged model an output of its run, unless it is one: then the run's page lists it."""
    from mlflow.entities import LoggedModelOutput

    if all(output.model_id != model.model_id for output in (run.outputs and run.outputs.model_outputs) or ()):
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])


def link_metric(
    client: MlflowClient, run: Run, model: LoggedModel, metric: Mapping[str, Any], step: int, time: int | None = None
) -> None:
    """Log the metric ``{"name", "value"}`` of a run for one of its models too, so that models can be searched and
    sorted by it. Doing it again changes nothing.

    Args:
        step: of the run's own point, which MLflow does not store twice.
        time: of that point; None: that which the run has by now, if any.
    """
    if any(known.key == metric["name"] for known in model.metrics or ()):
        return
    if time is None:
        points = client.get_metric_history(run.info.run_id, metric["name"])
        time = next((point.timestamp for point in points if (point.step, point.value) == (step, metric["value"])), None)
    data = next((entry.dataset for entry in (run.inputs and run.inputs.dataset_inputs) or ()), None)
    client.log_metric(
        run.info.run_id,
        metric["name"],
        metric["value"],
        timestamp=time,
        step=step,
        dataset_name=data.name if data else None,
        dataset_digest=data.digest if data else None,
        model_id=model.model_id,
    )


def _tags(record: Record) -> dict[str, str]:
    """Of the model of a checkpoint. Those it shares with an exported generator have the same names."""
    tags = {_TAG: record["path"], "recipe": record["recipe"], "kimg": f"{record['kimg']:g}"}
    if metric := record["metric"]:
        tags |= {"metric": metric["name"], "metric_value": str(metric["value"])}
    return tags
