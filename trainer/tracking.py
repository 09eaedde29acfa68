"""Records of a training: ``metrics.jsonl`` beside the run, and MLflow.

The driver opens (or reopens) the MLflow run; rank 0 alone holds a ``Tracker`` and writes to it. Everything goes
through ``MlflowClient`` with an explicit run id: MLflow's fluent API keeps the active run in thread-local state and
is neither thread-safe nor fit for a run that several processes take turns to write (mlflow#11782).

MLflow's steps are whole kimg (thousands of images seen). Where ticks are shorter than one kimg, several points share
a step and MLflow keeps them all, in order of time; ``metrics.jsonl`` has the exact position of each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from infer.command import UserError, say
from trainer.data.manifest import Manifest
from trainer.outbox import Outbox, brief, redact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

_CLOSE_SECONDS = 30.0
_SQLITE = "sqlite:///"

# MLflow's own limits (mlflow/utils/validation.py).
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36


def resolve_uri(uri: str | None, out: Path) -> str:
    """The tracking URI: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in ``out``. SQLite paths come back
    absolute, since the workers have other working directories.

    Raises:
        UserError: a ``file:`` URI or a plain path, which MLflow no longer writes to.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path(out).resolve() / 'mlflow.db'}"
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"tracking URI {uri} is a file store, which MLflow no longer writes to; give sqlite:///PATH.db or"
            " http://HOST:PORT, and bring old runs along with `mlflow migrate-filestore`"
        )
    path = _sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{path}"


def connect(uri: str) -> MlflowClient:
    """A quiet client of the tracking server and registry at ``uri``."""
    _configure()
    # Imported here because it takes about two seconds, which only rank 0 and the driver need to spend.
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def _configure() -> None:
    """MLflow reads these when it is imported: give up after seconds instead of minutes, keep quiet, send nothing to
    its makers. What the user has set wins."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def open_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    config: Mapping[str, Any],
    manifest: Manifest,
    run_id: str | None = None,
) -> str:
    """Open a run of MLflow, or the existing one ``run_id`` again, and describe it; returns its id.

    Args:
        uri: see ``resolve_uri``.
        experiment: created if it is new; beside an SQLite file its artifacts go to ``mlartifacts``.
        name: the run's name in the UI.
        config: nested; logged as params ``group.field``. A param cannot change in MLflow, so a value that is another
            when the run is reopened becomes the tag ``resumed.group.field``.
        manifest: the data set, logged as the run's input.

    Raises:
        UserError: MLflow does not answer, or does not know the run.
    """
    path = _sqlite_path(uri)
    if path is not None:
        _prepare_sqlite(path)
    _configure()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = connect(uri)
        if run_id is None:
            run_id = _create_run(client, experiment, name, path)
        else:
            _reopen_run(client, uri, run_id)
        _describe(client, run_id, config, manifest)
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        raise UserError(
            f"MLflow at {redact(uri)} cannot be used ({brief(error)}); start the server (mlflow/serve.sh) or give"
            " another --track.uri"
        ) from error
    return run_id


def end_run(uri: str, run_id: str, status: Status) -> None:
    """Set the run's final status. A server that is gone by then is worth a line, not a failure."""
    _configure()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        connect(uri).set_terminated(run_id, status)
    except (MlflowException, SQLAlchemyError) as error:
        say(f"MLflow at {redact(uri)} did not take the run's status {status} ({brief(error)})")


class Tracker:
    """Writes the records of one run; rank 0 only.

    ``metrics.jsonl`` is written at once. MLflow is served from a thread of its own, so that neither SQLite's locks
    nor a slow server hold up training: what it cannot take now is offered again with the next record and on
    ``close``.
    """

    def __init__(self, run_dir: Path, uri: str, run_id: str) -> None:
        """``run_dir`` holds ``metrics.jsonl``; ``run_id`` comes from ``open_run`` with the same ``uri``.

        Raises:
            UserError: an SQLite file that this machine does not have.
        """
        path = _sqlite_path(uri)
        if path is not None and not path.is_file():
            raise UserError(
                f"{uri} is not on this machine; to train on several machines start a tracking server"
                " (mlflow/serve.sh) and give its address as --track.uri"
            )
        self.run_id = run_id
        self._uri = uri
        self._metrics = run_dir / "metrics.jsonl"
        self._client = connect(uri)
        self._outbox = Outbox(f"MLflow at {redact(uri)}")

    def rewind(self, nimg: int) -> None:
        """Forget the lines of ``metrics.jsonl`` beyond ``nimg`` images (and a torn last line), so that a training
        that continues there leaves no point twice. MLflow cannot forget: there the repeated points share steps."""
        if not self._metrics.exists():
            return
        kept = [line for line, position in _lines(self._metrics) if position <= nimg]
        temporary = self._metrics.with_name(f".{self._metrics.name}.{os.getpid()}")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._metrics)

    def log_scalars(self, values: Mapping[str, float], nimg: int) -> None:
        """One line ``{"nimg", "kimg", ...}`` of ``metrics.jsonl``, where a value that is not finite is null, and one
        point per value in MLflow at step ``nimg // 1000``."""
        from mlflow.entities import Metric

        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"nimg": nimg, "kimg": nimg / 1000, **finite}, allow_nan=False) + "\n")
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, float(value), now, nimg // 1000) for name, value in values.items()]
        self._outbox.put(lambda: self._client.log_batch(self.run_id, metrics=metrics, synchronous=True))

    def log_grid(self, key: str, image: Image.Image, nimg: int, path: Path) -> None:
        """A picture for the UI's image view at step ``nimg // 1000``, and its file ``path`` under ``samples/``.

        Only MLflow itself writes to its ``images/`` folder: one foreign file there hides them all (mlflow#24789).
        """
        assert re.fullmatch("[a-z_]+", key), key
        now = time.time_ns() // 1_000_000
        self._outbox.put(
            lambda: self._client.log_image(
                self.run_id, image, key=key, step=nimg // 1000, timestamp=now, synchronous=True
            )
        )
        self.log_artifact(path, "samples")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """The file ``path`` as an artifact in ``folder`` (default: at the top). It is read later, so replace it
        atomically or not at all."""
        self._outbox.put(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def close(self, status: Status | None = None) -> None:
        """Wait until MLflow has everything, half a minute at the most, and with a ``status`` end the run; without one
        it stays open for the driver to end."""
        self._outbox.close(_CLOSE_SECONDS)
        if status is not None:
            end_run(self._uri, self.run_id, status)


def _sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for anything else."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).resolve() if uri.startswith(_SQLITE) else None


def _prepare_sqlite(path: Path) -> None:
    """MLflow retries for two minutes on a database it cannot open, so look first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"cannot write the MLflow database {path}: {error.strerror}; give another --out") from None


def _create_run(client: MlflowClient, experiment: str, name: str, database: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = None if database is None else str(database.parent / "mlartifacts")
        try:
            experiment_id = client.create_experiment(experiment, artifact_location=location)
        except MlflowException as error:
            # Another training may have created it in the meantime.
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise error from None
            experiment_id = found.experiment_id
    else:
        experiment_id = found.experiment_id
    tags = {"mlflow.user": os.environ.get("USER", "unknown"), "mlflow.source.name": "trainer/run.py"}
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


def _reopen_run(client: MlflowClient, uri: str, run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"MLflow at {redact(uri)} has no run {run_id}, which this training belongs to; give the --track.uri it"
            " was started with, or another --name"
        ) from None
    if run.info.lifecycle_stage == "deleted":
        raise UserError(f"MLflow run {run_id} was deleted: `mlflow runs restore --run-id {run_id}`, or another --name")
    client.update_run(run_id, status="RUNNING")


def _describe(client: MlflowClient, run_id: str, config: Mapping[str, Any], manifest: Manifest) -> None:
    from mlflow.entities import DatasetInput, InputTag, Param, RunTag

    known = client.get_run(run_id).data.params
    params = dict(_flatten(config))
    new = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH])
    tags = _code_version(Path(__file__).resolve().parents[1]) | {"recipe": str(config["recipe"])}
    tags |= {f"resumed.{key}": value for key, value in params.items() if known.get(key, value) != value}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.log_inputs(run_id, [DatasetInput(_dataset(manifest), [InputTag("mlflow.data.context", "training")])])


def _dataset(manifest: Manifest) -> Any:
    """The data set as MLflow's entity: identified by the first 36 characters of the manifest's digest (MLflow's
    limit)."""
    from mlflow.entities import Dataset

    images = {f"{name}_images": split.images for name, split in manifest.splits.items()}
    shards = {f"{name}_shards": len(split.shards) for name, split in manifest.splits.items()}
    root = str(manifest.root)
    return Dataset(
        name=Path(root).name or "data",
        digest=manifest.digest[:_DIGEST_LENGTH],
        source_type="webdataset",
        source=json.dumps({"uri": redact(root)}),
        profile=json.dumps({"size": manifest.size, **images, **shards, "digest": manifest.digest}),
    )


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


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Whole lines of ``metrics.jsonl`` with their positions."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else a crash cut it off
                yield line, json.loads(line)["nimg"]
