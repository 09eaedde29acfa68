"""Records of a training: ``metrics.jsonl`` for people and scripts, and a run in MLflow, which may be away.

The driver calls ``open_run`` before training and ``end_run`` after it; while training, rank 0 logs to a ``Tracker``.
Each record for MLflow is first appended to the outbox in the run's folder, so a killed training loses none. Records
are delivered in that order: by a thread while training, by ``end_run``, or later by ``sync``. One that is sent twice,
since a process was killed in between, changes nothing in MLflow (``trainer.tracking.delivery``).

A training that is continued repeats the steps since its last checkpoint, and MLflow cannot delete points. As long as
the repeated values are those that the outbox has already, as in one process, nothing is added. From the first value
that differs, after a rollback or with another number of workers, all values of that name are added again: MLflow's
charts then show both at each step, first the abandoned ones and last those that led to the current networks. A repeated
grid replaces the one before. ``metrics.jsonl`` is truncated and never has abandoned values.

Steps in MLflow are whole kimg (thousands of images seen). Points within the same kimg share a step, in order of time;
``metrics.jsonl`` has the exact positions.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from catgan.command import UserError, say
from catgan.dataset import Manifest
from trainer.checkpoints.checkpoint import folder_name
from trainer.tracking.delivery import Delivery, Register
from trainer.tracking.description import describe
from trainer.tracking.journal import Journal
from trainer.tracking.messages import redact
from trainer.tracking.outbox import DeliveryState, DeliveryThread, Outbox, describe_refused
from trainer.tracking.server import (
    as_user_errors,
    check_experiment,
    check_reachable,
    connect,
    find_run,
    mlflow_errors,
    resolve_uri,
    server_name,
    sqlite_path,
    with_password,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_CLOSE_SECONDS = 30.0
_OFFLINE = "offline-"
_TAG_LENGTH = 5000  # MLflow's limit (mlflow/utils/validation.py)


def open_run(
    run_dir: Path,
    uri: str,
    experiment: str,
    *,
    config: Mapping[str, Any],
    manifest: Manifest,
    register: Register,
    run_id: str | None = None,
    offline: bool = False,
    sweep: Mapping[str, str] | None = None,
) -> str:
    """Create the MLflow run of a training, named like the folder ``run_dir``, or reopen it, and describe it.

    Args:
        run_dir: the run's folder, with the outbox.
        uri: see ``resolve_uri``.
        experiment: its name; created if there is none.
        config: nested; logged as params ``group.field``. MLflow cannot change a param, so a value that differs when
            the run is reopened becomes the tag ``resumed.group.field``.
        manifest: the data set, logged as the run's input.
        register: registers generators that an earlier process has queued.
        run_id: the result of an earlier call, if known.
        offline: only queue the record, for ``sync`` to deliver.
        sweep: ``id`` and ``name`` of the sweep whose run becomes the parent of this one, see ``tracking.sweeps``.

    Returns:
        The id of the training: MLflow's run id, or as long as there is no run in MLflow ``offline-`` and a number,
        which becomes the run's tag ``catgan.run``.

    Raises:
        UserError: MLflow does not answer or does not have the run, or the disk is full.
    """
    outbox = Outbox(run_dir)
    state = outbox.state()
    if run_id is not None and not run_id.startswith(_OFFLINE) and "run_id" not in state:
        state["run_id"] = run_id
        outbox.save_state(state)
    if not offline:
        _check_start(uri, experiment, state)
    recorded = next((record["run"] for record in outbox.journal.records() if record["kind"] == "open"), None)
    key = run_id or recorded or ((_OFFLINE if offline else "") + secrets.token_hex(16))
    opened = {"kind": "open", "time": _now(), "run": key, "uri": redact(uri), "experiment": experiment}
    if sweep:
        opened["sweep"] = dict(sweep)
    outbox.put(opened | {"name": run_dir.name} | describe(config, manifest))
    if outbox.journal.has_unwritten:
        raise UserError(f"{outbox.journal.path} cannot be written; free some space and run the same command again")
    if not offline:
        with as_user_errors(uri):
            Delivery(run_dir, uri, register=register).deliver_points()
    return key if key == run_id or offline else outbox.state()["run_id"]


def end_run(
    run_dir: Path, uri: str, status: Status, offline: bool = False, *, register: Register, location: str | None = None
) -> None:
    """Set the run's final status and deliver all queued records. If MLflow cannot be used, print a warning.

    Args:
        offline: only queue the status.
        register: see ``Register``.
        location: path or URL of the run for the printed command (default: ``run_dir``).
    """
    outbox = Outbox(run_dir)
    outbox.put({"kind": "status", "time": _now(), "status": status})
    saved = [record for record in outbox.journal.records() if record["kind"] == "checkpoint"]
    if saved:
        outbox.put(saved[-1] | {"time": _now()})  # see ``trainer.tracking.models``
    reason = ""
    if not offline:
        try:
            check_reachable(uri)
            _deliver(run_dir, uri, register)
        except UserError as error:
            reason = f"warning: {error}; "
    if num := outbox.num_undelivered():
        say(
            f"{reason}{num} records are not in MLflow yet; {_sync_command(location or str(run_dir), uri)} delivers them"
        )


def sync(run_dir: Path, uri: str | None = None, *, register: Register) -> dict[str, Any]:
    """Deliver the records that are still in a run's outbox. It may be interrupted and called again at any time.

    Args:
        uri: default: the one that the training was started with. Its user and password, which are not recorded, come
            from MLFLOW_TRACKING_URI or MLflow's other variables.
        register: see ``Register``.

    Returns:
        The JSON object of ``cattrain sync``.

    Raises:
        UserError: ``run_dir`` is no run, or MLflow does not answer or does not have the run.
    """
    outbox = Outbox(run_dir)
    opened = [record for record in outbox.journal.records() if record["kind"] == "open"]
    if not opened:
        raise UserError(f"{run_dir} has no records for MLflow (outbox.jsonl); give the folder of a run")
    uri = resolve_uri(uri or with_password(opened[-1]["uri"]), run_dir.parent)
    num = outbox.num_undelivered()
    say(f"{num} records to deliver to {server_name(uri)}")
    if num:
        try:
            check_reachable(uri)
            _check_run(uri, opened[-1]["experiment"], outbox.state())
            _deliver(run_dir, uri, register)
        except UserError as error:
            raise UserError(
                f"{error}; {outbox.num_undelivered()} of {num} records are left; fix this, then run the same command"
                " again"
            ) from error.__cause__
    return {"run_dir": str(run_dir), "mlflow_run_id": mlflow_run_id(run_dir), "delivered": num}


def mlflow_run_id(run_dir: Path) -> str | None:
    """MLflow's id of the run; None as long as there is no run in MLflow."""
    return Outbox(run_dir).state().get("run_id")


def is_finished(run_dir: Path) -> bool:
    """Whether the run ended with its model exported and logged, and was not opened again."""
    changes = [record for record in Outbox(run_dir).journal.records() if record["kind"] in ("open", "status")]
    return bool(changes) and changes[-1].get("status") == "FINISHED"


class Tracker:
    """Logs the records of one run; rank 0 only.

    A record is on disk when the call that logs it returns. No call waits for MLflow or fails when the disk is full, see
    ``trainer.tracking.journal``.
    """

    def __init__(self, run_dir: Path, uri: str | None = None, *, register: Register | None = None) -> None:
        """Log to the run's folder and, given a ``uri``, deliver to MLflow in the background.

        Args:
            run_dir: what ``open_run`` was given.
            uri: what ``open_run`` was given; None: queue the records only.
            register: needed with ``uri``, see ``Register``.

        Raises:
            UserError: ``uri`` is an SQLite file that is not on this machine.
        """
        self._run_dir = run_dir
        self._metrics = Journal(run_dir / "metrics.jsonl")
        self._outbox = Outbox(run_dir)
        self._last_time = 0
        self._earlier: dict[str, dict[int, float | str]] = {}
        self._grids: dict[tuple[str, int], int] = {}
        self._threads: list[DeliveryThread] = []
        if uri is not None:
            assert register is not None
            database = sqlite_path(uri)
            if database is not None and not database.is_file():
                raise UserError(
                    f"{uri} is not on this machine; to train on several machines start a tracking server"
                    " (mlflow/serve.sh) and give its address as --track.uri"
                )
            delivery, name = Delivery(run_dir, uri, register=register), server_name(uri)
            self._threads = [
                DeliveryThread(delivery.deliver_points, name, "records", _delivery_errors),
                DeliveryThread(partial(delivery.deliver_files, patient=True), name, "files", _delivery_errors),
            ]

    def rewind(self, nimg: int) -> None:
        """Prepare to continue at ``nimg`` images: remove later lines of ``metrics.jsonl``, and look up the values and
        grids from there on that the outbox has already."""
        self._metrics.keep(lambda record: record["nimg"] <= nimg)
        self._earlier, self._grids = {}, {}
        for record in self._outbox.journal.records():
            self._last_time = max(self._last_time, record["time"])  # a clock that was set back must not mix up attempts
            if record["kind"] == "scalars" and record["nimg"] >= nimg:
                for name, value in record["values"].items():
                    self._earlier.setdefault(name, {})[record["nimg"]] = value
            elif record["kind"] == "grid" and record["nimg"] >= nimg:
                self._grids.setdefault((record["key"], record["nimg"]), record["time"])

    def log_scalars(self, values: Mapping[str, float], nimg: int) -> None:
        """Add a line ``{"nimg", "kimg", ...}`` to ``metrics.jsonl``, with null for values that are not finite, and for
        each value queue a point for MLflow at step ``nimg // 1000``, unless it repeats what the outbox has."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.append({"nimg": nimg, "kimg": nimg / 1000, **finite})
        new = {}
        for name, value in values.items():
            plain = float(value) if math.isfinite(value) else str(float(value))
            if self._earlier.get(name, {}).get(nimg) == plain:
                continue
            self._earlier.pop(name, None)  # it differs: from here on all values are new
            new[name] = plain
        if new:
            self._put({"kind": "scalars", "nimg": nimg, "values": new})

    def log_grid(self, key: str, nimg: int, path: Path) -> None:
        """Queue the image ``path`` for the UI's image view at step ``nimg // 1000``, where it replaces an earlier one
        of this position, and as an artifact in ``samples/``. For the file see ``log_artifact``."""
        assert re.fullmatch("[a-z_]+", key), key
        grid = {"kind": "grid", "nimg": nimg, "key": key, "path": self._relative(path)}
        if (key, nimg) in self._grids:
            grid["shown_as"] = self._grids[key, nimg]
        self._put(grid)
        self.log_artifact(path, "samples")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue the file ``path`` in the run's folder as an artifact in ``folder`` (default: the top level).

        The file is read when it is delivered, perhaps after the training: do not move it, and replace it atomically.
        """
        self._put({"kind": "artifact", "path": self._relative(path), "folder": folder})

    def log_model(self, name: str, onnx: Path, info: Mapping[str, Any]) -> None:
        """Queue ``onnx``, a file in the run's folder, to be registered as a version of the model ``name`` with the
        generator's origin ``info``, see ``Register``. Once another file has replaced it, it is not registered."""
        digest = hashlib.sha256(onnx.read_bytes()).hexdigest()
        self._put({"kind": "model", "name": name, "path": self._relative(onnx), "sha256": digest, "info": dict(info)})

    def log_checkpoint(
        self,
        nimg: int,
        kept: Sequence[str],
        recipe: str,
        metric: Mapping[str, Any] | None,
        best: Mapping[str, Any] | None,
    ) -> None:
        """Queue the checkpoint saved at ``nimg`` images as a logged model without files.

        Args:
            kept: names of the run's checkpoints since then. The models of others are deleted.
            metric: of its generator; None: it was not evaluated.
            best: of the best generator so far, with its ``kimg``.
        """
        record = {"kind": "checkpoint", "path": folder_name(nimg), "kimg": nimg / 1000, "recipe": recipe}
        self._put(record | {"kept": list(kept), "metric": _short(metric), "best": _short(best)})

    def note(self, kind: str, text: str, nimg: int) -> None:
        """Queue a note on an event at ``nimg`` images, such as ``("rollback", "loss not finite, back to 512 kimg")``.
        The tag ``note.<kind>`` holds the latest of its kind, the artifact ``events.txt`` all of them in order."""
        assert re.fullmatch("[a-z_]+", kind), kind
        text = redact(" ".join(text.split()))[:_TAG_LENGTH]
        self._put({"kind": "note", "note": kind, "text": text, "nimg": nimg})

    def close(self) -> None:
        """Deliver queued records for up to 30 seconds. ``end_run`` or ``sync`` delivers the others."""
        self._metrics.flush()
        self._outbox.journal.flush()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.close(max(deadline - time.monotonic(), 0))

    def _put(self, record: dict[str, Any]) -> None:
        self._last_time = max(_now(), self._last_time + 1)  # MLflow drops an equal point with the same millisecond
        self._outbox.put({"time": self._last_time, **record})
        for thread in self._threads:
            thread.notify()

    def _relative(self, path: Path) -> str:
        """Relative to the run's folder, which may be moved before its records are delivered."""
        return path.relative_to(self._run_dir).as_posix()


def _short(metric: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a record needs of an evaluation's result; None if its value is not finite."""
    if metric is None or not math.isfinite(metric["value"]):
        return None
    return {key: metric[key] for key in ("name", "value", "kimg")}


def _check_start(uri: str, experiment: str, state: DeliveryState) -> None:
    """Check that MLflow can record the training.

    Raises:
        UserError: MLflow does not answer, or does not have the run, or the experiment was deleted.
    """
    _check_answers(uri)
    _check_run(uri, experiment, state)


def _check_answers(uri: str) -> None:
    try:
        check_reachable(uri)
    except UserError as error:
        raise UserError(
            f"{error}; start the server (mlflow/serve.sh), set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if"
            " it needs them, give another --track.uri, or train with --track.offline and deliver the records later"
        ) from error.__cause__


def _check_run(uri: str, experiment: str, state: DeliveryState) -> None:
    """Check that MLflow has the run, if it was created before; otherwise that it can be created.

    Raises:
        UserError: it has not, or the experiment was deleted.
    """
    with as_user_errors(uri):
        client = connect(uri)
        if "run_id" in state:
            find_run(client, uri, state["run_id"])
        elif found := client.get_experiment_by_name(experiment):
            check_experiment(found, uri)


def _deliver(run_dir: Path, uri: str, register: Register) -> None:
    """Deliver all queued records.

    Raises:
        UserError: that was not possible, or files were refused.
    """
    delivery = Delivery(run_dir, uri, register=register)
    with as_user_errors(uri):
        delivery.deliver_points()
        delivery.deliver_files()
    if refused := Outbox(run_dir).refused_files():
        raise UserError(f"{server_name(uri)} refuses {describe_refused(refused)}")


def _delivery_errors() -> tuple[type[Exception], ...]:
    return (*mlflow_errors(), UserError)


def _sync_command(location: str, uri: str) -> str:
    command = f"`cattrain sync {shlex.quote(location)}`"
    if redact(uri) == uri:
        return command
    user = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if uri.startswith("http") else "MLFLOW_TRACKING_URI"
    return f"{command}, with {user} set,"


def _now() -> int:
    """Milliseconds, MLflow's unit of time."""
    return time.time_ns() // 1_000_000
