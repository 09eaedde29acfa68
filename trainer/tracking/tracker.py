"""Records of a training: ``metrics.jsonl`` for people and scripts, and a run in MLflow, which may be away.

The driver calls ``open_run`` before training and ``end_run`` after it; while training, rank 0 logs to a ``Tracker``.
Each record for MLflow is first appended to the outbox in the run's folder, so a killed training loses none. Records
are delivered in that order: by a thread while training, by ``end_run``, or later by ``sync``. One that is sent twice,
since a process was killed in between, changes nothing in MLflow (``trainer.tracking.delivery``).

A training that is continued repeats the steps since its last checkpoint, and MLflow cannot delete points. So the outbox
takes a scalar or grid once per position: MLflow keeps the values of the first attempt, and a repetition adds what is
missing. In one process the repeated values are the same; with another number of workers, or after a rollback, they
differ slightly. ``metrics.jsonl`` is truncated instead and has the values that led to the current networks.

Steps in MLflow are whole kimg (thousands of images seen). Points within the same kimg share a step, in order of time;
``metrics.jsonl`` has the exact positions.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from catgan.command import UserError, say
from catgan.dataset import Manifest
from trainer.tracking.delivery import Delivery, Register
from trainer.tracking.description import describe
from trainer.tracking.journal import Journal
from trainer.tracking.outbox import DeliveryState, DeliveryThread, Outbox, redact
from trainer.tracking.server import (
    as_user_errors,
    check_reachable,
    connect,
    find_run,
    mlflow_errors,
    resolve_uri,
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
        _check_start(run_dir, uri)
        _check_run(uri, state)
    recorded = next((record["run"] for record in outbox.journal.records() if record["kind"] == "open"), None)
    key = run_id or recorded or ((_OFFLINE if offline else "") + secrets.token_hex(16))
    opened = {"kind": "open", "time": _now(), "run": key, "uri": redact(uri), "experiment": experiment}
    outbox.put(opened | {"name": run_dir.name} | describe(config, manifest))
    if outbox.journal.has_unwritten:
        raise UserError(f"{outbox.journal.path} cannot be written; free some space and run the same command again")
    if not offline:
        _deliver(run_dir, uri, register)
    return key if key == run_id or offline else outbox.state()["run_id"]


def end_run(run_dir: Path, uri: str, status: Status, offline: bool = False, *, register: Register) -> None:
    """Set the run's final status and deliver all queued records. If MLflow cannot be used, print a warning.

    Args:
        offline: only queue the status.
        register: see ``Register``.
    """
    outbox = Outbox(run_dir)
    outbox.put({"kind": "status", "time": _now(), "status": status})
    reason = ""
    if not offline:
        try:
            check_reachable(uri)
            _deliver(run_dir, uri, register)
        except UserError as error:
            reason = f"warning: {error}; "
    if num := outbox.num_undelivered():
        say(f"{reason}{num} records are not in MLflow yet; `cattrain sync {run_dir}` delivers them")


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
    say(f"{num} records to deliver to MLflow at {redact(uri)}")
    delivered = 0
    if num:
        try:
            check_reachable(uri)
            _check_run(uri, outbox.state())
            delivered = _deliver(run_dir, uri, register)
        except UserError as error:
            raise UserError(
                f"{error}; {outbox.num_undelivered()} of {num} records are left; fix this, then run the same command"
                " again"
            ) from error.__cause__
    return {"run_dir": str(run_dir), "mlflow_run_id": mlflow_run_id(run_dir), "delivered": delivered}


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
        self._queued: set[tuple[str, int]] = set()
        self._thread: DeliveryThread | None = None
        if uri is not None:
            assert register is not None
            database = sqlite_path(uri)
            if database is not None and not database.is_file():
                raise UserError(
                    f"{uri} is not on this machine; to train on several machines start a tracking server"
                    " (mlflow/serve.sh) and give its address as --track.uri"
                )
            send = Delivery(run_dir, uri, register=register).send
            errors = (*mlflow_errors(), UserError)
            self._thread = DeliveryThread(self._outbox, send, f"MLflow at {redact(uri)}", errors)

    def rewind(self, nimg: int) -> None:
        """Prepare to continue at ``nimg`` images: remove later lines of ``metrics.jsonl``, and look up the scalars and
        grids from there on that the outbox has already."""
        self._metrics.keep(lambda record: record["nimg"] <= nimg)
        self._queued = {
            (key, record["nimg"])
            for record in self._outbox.journal.records()
            if record["kind"] in ("scalars", "grid") and record["nimg"] >= nimg
            for key in (record["values"] if record["kind"] == "scalars" else [record["key"]])
        }

    def log_scalars(self, values: Mapping[str, float], nimg: int) -> None:
        """Add a line ``{"nimg", "kimg", ...}`` to ``metrics.jsonl``, with null for values that are not finite, and for
        each value queue a point for MLflow at step ``nimg // 1000``, unless the outbox has it already."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.append({"nimg": nimg, "kimg": nimg / 1000, **finite})
        new = {
            name: float(value) if math.isfinite(value) else str(float(value))
            for name, value in values.items()
            if (name, nimg) not in self._queued
        }
        if new:
            self._put({"kind": "scalars", "nimg": nimg, "values": new})

    def log_grid(self, key: str, nimg: int, path: Path) -> None:
        """Queue the image ``path`` for the UI's image view at step ``nimg // 1000`` and as an artifact in ``samples/``,
        unless the outbox has it already. For the file see ``log_artifact``."""
        assert re.fullmatch("[a-z_]+", key), key
        if (key, nimg) in self._queued:
            return
        self._put({"kind": "grid", "nimg": nimg, "key": key, "path": self._relative(path)})
        self.log_artifact(path, "samples")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue the file ``path`` in the run's folder as an artifact in ``folder`` (default: the top level).

        The file is read when it is delivered, perhaps after the training: do not move it, and replace it atomically.
        """
        self._put({"kind": "artifact", "path": self._relative(path), "folder": folder})

    def log_model(self, name: str, onnx: Path, info: Mapping[str, Any]) -> None:
        """Queue ``onnx``, a file in the run's folder, to be registered as a version of the model ``name`` with the
        generator's origin ``info``, see ``Register``."""
        self._put({"kind": "model", "name": name, "path": self._relative(onnx), "info": dict(info)})

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
        if self._thread is not None:
            self._thread.close(_CLOSE_SECONDS)

    def _put(self, record: dict[str, Any]) -> None:
        self._last_time = max(_now(), self._last_time + 1)  # MLflow drops an equal point with the same millisecond
        self._outbox.put({"time": self._last_time, **record})
        if self._thread is not None:
            self._thread.notify()

    def _relative(self, path: Path) -> str:
        """Relative to the run's folder, which may be moved before its records are delivered."""
        return path.relative_to(self._run_dir).as_posix()


def _check_start(run_dir: Path, uri: str) -> None:
    """Check that MLflow answers; if not, remove ``run_dir`` if it is empty, since no training began.

    Raises:
        UserError: it does not.
    """
    try:
        check_reachable(uri)
    except UserError as error:
        with contextlib.suppress(OSError):
            run_dir.rmdir()
        raise UserError(
            f"{error}; start the server (mlflow/serve.sh), set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if"
            " it needs them, give another --track.uri, or train with --track.offline and deliver the records later"
        ) from error.__cause__


def _check_run(uri: str, state: DeliveryState) -> None:
    """Check that MLflow has the run, if it was created before.

    Raises:
        UserError: it does not.
    """
    if "run_id" in state:
        with as_user_errors(uri):
            find_run(connect(uri), uri, state["run_id"])


def _deliver(run_dir: Path, uri: str, register: Register) -> int:
    """Deliver all queued records. Returns their number.

    Raises:
        UserError: that was not possible.
    """
    with as_user_errors(uri):
        return Outbox(run_dir).deliver(Delivery(run_dir, uri, register=register).send)


def _now() -> int:
    """Milliseconds, MLflow's unit of time."""
    return time.time_ns() // 1_000_000
