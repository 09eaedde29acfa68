"""Records of a training: ``metrics.jsonl`` for people and scripts, and MLflow, which may be away.

Rank 0 alone holds a ``Tracker`` while it trains; before and after, the driver calls ``open_run`` and ``end_run``. All
that is meant for MLflow is first written to the outbox in the run's folder (``trainer.tracking.outbox``) and then
delivered in order: by a thread while training, by ``end_run``, or later by ``sync``. A training that is
killed loses nothing of it.

A training that is continued repeats the steps since its last checkpoint. MLflow cannot forget points, so the outbox
takes a point, or a grid, at a position once: what the first try recorded stands, and the repetition adds what is
missing. Points therefore show in MLflow at once, without waiting for a checkpoint, and still none comes twice and none
is missing. In one process the repetition computes the same numbers again; with another number of workers, or after a
rollback, MLflow keeps those of the first try up to where that ended. ``metrics.jsonl`` forgets the first try and has
those that led to the present networks.

MLflow's steps are whole kimg (thousands of images seen). Where ticks are shorter than one kimg, several points share
a step and MLflow keeps them all, in order of time; ``metrics.jsonl`` has the exact position of each.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from catgan.command import UserError, say, without_queries
from trainer.data.manifest import Manifest
from trainer.tracking.delivery import Delivery
from trainer.tracking.journal import Journal
from trainer.tracking.outbox import Courier, Memo, Outbox, redact
from trainer.tracking.server import (
    as_user_errors,
    connect,
    failures,
    find_run,
    reach,
    resolve_uri,
    sqlite_path,
    with_password,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_CLOSE_SECONDS = 30.0
_OFFLINE = "offline-"

# MLflow's own limits (mlflow/utils/validation.py).
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36
_TAG_LENGTH = 5000


def open_run(
    run_dir: Path,
    uri: str,
    experiment: str,
    *,
    config: Mapping[str, Any],
    manifest: Manifest,
    run_id: str | None = None,
    offline: bool = False,
) -> str:
    """Open a run of MLflow named like the folder ``run_dir``, or the one that belongs to it again, and describe it.

    Args:
        run_dir: the run's folder, where the outbox is.
        uri: see ``resolve_uri``.
        experiment: created if it is new; beside an SQLite file its artifacts go to ``mlartifacts``.
        config: nested; logged as params ``group.field``. A param cannot change in MLflow, so a value that is another
            when the run is reopened becomes the tag ``resumed.group.field``.
        manifest: the data set, logged as the run's input.
        run_id: what an earlier call returned, if that is known.
        offline: write the record only, for ``sync`` to deliver.

    Returns:
        What identifies the training: MLflow's id of the run, or while it has none ``offline-`` and a number, which
        becomes the run's tag ``catgan.run``.

    Raises:
        UserError: MLflow does not answer, or does not know the run, or the disk is full.
    """
    outbox = Outbox(run_dir)
    memo = outbox.memo()
    if run_id is not None and not run_id.startswith(_OFFLINE) and "run_id" not in memo:
        memo["run_id"] = run_id
        outbox.remember(memo)
    if not offline:
        try:
            reach(uri)
        except UserError as error:
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # if it is empty: nothing began
            raise UserError(
                f"{error}; start the server (mlflow/serve.sh), give MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD if it asks for them, give another --track.uri, or train with --track.offline"
                " and deliver the records later"
            ) from error.__cause__
        _check(uri, memo)
    recorded = next((record["run"] for record, _ in outbox.journal.read() if record["kind"] == "open"), None)
    key = run_id or recorded or ((_OFFLINE if offline else "") + secrets.token_hex(16))
    outbox.put(
        {
            "kind": "open",
            "time": _now(),
            "run": key,
            "uri": redact(uri),
            "experiment": experiment,
            "name": run_dir.name,
            "user": os.environ.get("USER", "unknown"),
            "params": dict(_flatten(config)),
            "tags": _code_version(Path(__file__).resolve().parents[2]) | {"recipe": str(config["recipe"])},
            "dataset": _dataset(manifest),
        }
    )
    if outbox.journal.is_behind:
        raise UserError(f"{outbox.journal.path} cannot be written; make room, then run it again")
    if not offline:
        _deliver(run_dir, uri)
    return key if key == run_id or offline else str(outbox.memo()["run_id"])


def end_run(run_dir: Path, uri: str, status: Status, offline: bool = False) -> None:
    """Set the run's final status and deliver what is left. A server that is away by then is worth a warning, not a
    failure."""
    outbox = Outbox(run_dir)
    outbox.put({"kind": "status", "time": _now(), "status": status})
    reason = ""
    if not offline:
        try:
            reach(uri)
            _deliver(run_dir, uri)
        except UserError as error:
            reason = f"warning: {error}; "
    if left := outbox.left():
        say(f"{reason}{left} records wait in {run_dir}: `cattrain sync {run_dir}` delivers them to MLflow")


def sync(run_dir: Path, uri: str | None = None) -> dict[str, Any]:
    """Deliver what the outbox of a run still holds. It may be cut off and called again at any time.

    Args:
        uri: default: the one that the training was started with. A user and a password that this had are not
            recorded; they come with ``uri``, or from MLFLOW_TRACKING_URI or MLflow's other variables.

    Returns:
        The JSON object of ``cattrain sync``.

    Raises:
        UserError: not a run, or MLflow does not answer or does not know the run.
    """
    outbox = Outbox(run_dir)
    opened = [record for record, _ in outbox.journal.read() if record["kind"] == "open"]
    if not opened:
        raise UserError(f"{run_dir} holds no records for MLflow (outbox.jsonl); give the folder of a run")
    uri = resolve_uri(uri or with_password(opened[-1]["uri"]), run_dir.parent)
    left = outbox.left()
    say(f"{left} records for MLflow at {redact(uri)}")
    delivered = 0
    if left:
        try:
            reach(uri)
            _check(uri, outbox.memo())
            delivered = _deliver(run_dir, uri)
        except UserError as error:
            raise UserError(
                f"{error}; {outbox.left()} of {left} records are left, run the same command again once that is mended"
            ) from error.__cause__
    return {"run_dir": str(run_dir), "mlflow_run_id": mlflow_run_id(run_dir), "delivered": delivered}


def mlflow_run_id(run_dir: Path) -> str | None:
    """MLflow's id of the run; None as long as it has none."""
    return Outbox(run_dir).memo().get("run_id")


def is_finished(run_dir: Path) -> bool:
    """Whether the run came to its end, with its model exported and logged, and was not opened again."""
    kinds = ("open", "status")
    last = [record for record, _ in Outbox(run_dir).journal.read() if record["kind"] in kinds][-1:]
    return bool(last) and last[0].get("status") == "FINISHED"


class Tracker:
    """Writes the records of one run; rank 0 only.

    What it is given is on disk when a call returns. Nothing waits for MLflow, and a full disk stops nothing either, see
    ``trainer.tracking.journal``.
    """

    def __init__(self, run_dir: Path, uri: str | None) -> None:
        """``run_dir`` was given to ``open_run`` with this ``uri``. None: deliver nothing.

        Raises:
            UserError: an SQLite file that this machine does not have.
        """
        path = sqlite_path(uri) if uri is not None else None
        if path is not None and not path.is_file():
            raise UserError(
                f"{uri} is not on this machine; to train on several machines start a tracking server"
                " (mlflow/serve.sh) and give its address as --track.uri"
            )
        self._folder = run_dir
        self._metrics = Journal(run_dir / "metrics.jsonl")
        self._outbox = Outbox(run_dir)
        self._time = 0
        self._taken: set[tuple[str, int]] = set()
        self._courier: Courier | None = None
        if uri is not None:
            delivery = Delivery(connect(uri), uri, run_dir)
            self._courier = Courier(self._outbox, delivery.send, f"MLflow at {redact(uri)}", (*failures(), UserError))

    def rewind(self, nimg: int) -> None:
        """A training is about to continue at ``nimg`` images: forget the lines of ``metrics.jsonl`` beyond, and mind
        which points and grids the outbox has of there."""
        self._metrics.keep(lambda record: record["nimg"] <= nimg)
        self._taken = {
            (key, record["nimg"])
            for record, _ in self._outbox.journal.read()
            if record["kind"] in ("scalars", "grid") and record["nimg"] >= nimg
            for key in (record["values"] if record["kind"] == "scalars" else [record["key"]])
        }

    def log_scalars(self, values: Mapping[str, float], nimg: int) -> None:
        """One line ``{"nimg", "kimg", ...}`` of ``metrics.jsonl``, where a value that is not finite is null, and one
        point per value in MLflow at step ``nimg // 1000``, unless there is one of this position."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.append({"nimg": nimg, "kimg": nimg / 1000, **finite})
        new = {
            name: float(value) if math.isfinite(value) else str(float(value))
            for name, value in values.items()
            if (name, nimg) not in self._taken
        }
        if new:
            self._put({"kind": "scalars", "nimg": nimg, "values": new})

    def log_grid(self, key: str, nimg: int, path: Path) -> None:
        """The picture ``path``, a file in the run's folder, for the UI's image view at step ``nimg // 1000``, and as
        a file under ``samples/``, unless there is one of this position. It is read later, like any artifact."""
        assert re.fullmatch("[a-z_]+", key), key
        if (key, nimg) in self._taken:
            return
        self._put({"kind": "grid", "nimg": nimg, "key": key, "path": self._relative(path)})
        self.log_artifact(path, "samples")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """The file ``path`` of the run's folder as an artifact in ``folder`` (default: at the top). It is read later,
        perhaps after the training: leave it there, and replace it atomically or not at all."""
        self._put({"kind": "artifact", "path": self._relative(path), "folder": folder})

    def log_model(self, name: str, onnx: Path, info: Mapping[str, Any]) -> None:
        """Have ``onnx``, a file in the run's folder, logged with the run and registered as a version of ``name``, see
        ``export.registry.register``."""
        self._put({"kind": "model", "name": name, "path": self._relative(onnx), "info": dict(info)})

    def note(self, kind: str, text: str, nimg: int) -> None:
        """Something worth knowing that happened at ``nimg`` images, such as ``("rollback", "loss not finite, back to
        512 kimg")``: the tag ``note.<kind>`` has the latest of its kind, ``events.txt`` among the artifacts all of
        them, in order."""
        assert re.fullmatch("[a-z_]+", kind), kind
        text = redact(" ".join(text.split()))[:_TAG_LENGTH]
        self._put({"kind": "note", "note": kind, "text": text, "nimg": nimg})

    def close(self) -> None:
        """Deliver what is left, for half a minute at the most; ``end_run`` goes on with it."""
        self._metrics.flush()
        self._outbox.journal.flush()
        if self._courier is not None:
            self._courier.close(_CLOSE_SECONDS)

    def _put(self, record: dict[str, Any]) -> None:
        self._time = max(_now(), self._time + 1)  # MLflow takes equal points of one millisecond for the same
        self._outbox.put({"time": self._time, **record})
        if self._courier is not None:
            self._courier.wake()

    def _relative(self, path: Path) -> str:
        """A run's folder may be moved before its records are delivered."""
        return path.relative_to(self._folder).as_posix()


def _check(uri: str, memo: Memo) -> None:
    """Look whether MLflow has the run, if there should be one.

    Raises:
        UserError: no.
    """
    if "run_id" in memo:
        with as_user_errors(uri):
            find_run(connect(uri), uri, memo["run_id"])


def _deliver(run_dir: Path, uri: str) -> int:
    """Deliver the whole outbox; returns the number of records.

    Raises:
        UserError: that was not possible.
    """
    with as_user_errors(uri):
        return Outbox(run_dir).deliver(Delivery(connect(uri), uri, run_dir).send)


def _now() -> int:
    """Milliseconds, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def _dataset(manifest: Manifest) -> dict[str, Any]:
    """The data set as MLflow knows it: identified by the first 36 characters of the manifest's digest (MLflow's
    limit)."""
    images = {f"{name}_images": split.images for name, split in manifest.splits.items()}
    shards = {f"{name}_shards": len(split.shards) for name, split in manifest.splits.items()}
    root = without_queries(redact(str(manifest.root)))
    return {
        "name": Path(root).name or "data",
        "digest": manifest.digest[:_DIGEST_LENGTH],
        "source": {"uri": root},
        "profile": {"size": manifest.size, **images, **shards, "digest": manifest.digest},
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"a": {"b": (1, 2)}}`` -> ``("a.b", "1 2")``, cut to MLflow's limit, without passwords in URLs."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", redact(text)[:_PARAM_LENGTH]


def _code_version(root: Path) -> dict[str, str]:
    """Tags: the package's version and, if ``root`` is a checkout, the commit and whether files differ from it."""
    tags = {}
    with contextlib.suppress(PackageNotFoundError):
        tags["catgan.version"] = version("catgan")
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD") or "none"
        tags["git.dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def _git(root: Path, *args: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
