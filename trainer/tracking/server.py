"""The MLflow server or SQLite file that a run is tracked in: its URI, a client, whether it answers, its errors."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from catgan.command import UserError
from catgan.files import atomic_path, remove_partials
from trainer.tracking.outbox import OutboxBusy, brief, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_PROBE_SECONDS = 10.0
_SQLITE = "sqlite:///"


def resolve_uri(uri: str | None, out: Path) -> str:
    """The tracking URI: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in ``out``. SQLite paths become
    absolute, since workers have other working directories.

    Raises:
        UserError: a ``file:`` URI or a plain path, which MLflow no longer supports.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path(out).resolve() / 'mlflow.db'}"
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"tracking URI {uri} is a file store, which MLflow no longer supports; give sqlite:///PATH.db or"
            " http://HOST:PORT, and copy old runs with `mlflow migrate-filestore`"
        )
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{path}"


def with_password(uri: str) -> str:
    """``uri`` with the user and password that MLFLOW_TRACKING_URI has for it, if any. URIs in files and in messages to
    workers have none."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if redact(given) == uri else uri


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite URI's file; None for any other URI."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).resolve() if uri.startswith(_SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and model registry at ``uri`` that logs warnings only."""
    configure()
    # Imported here because it takes about two seconds, which only rank 0 and the driver need to spend.
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def configure() -> None:
    """Set the defaults of variables that MLflow reads when it is imported: no retries (the outbox retries), no progress
    bars and links, no telemetry."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def check_reachable(uri: str) -> None:
    """Check within seconds that MLflow answers; create an SQLite file that does not exist.

    Raises:
        UserError: it does not.
    """
    path = sqlite_path(uri)
    if path is not None:
        _check_writable(path)
    if uri.startswith(("http://", "https://")):
        _probe(uri)
    with as_user_errors(uri), _creation_lock(path):
        if path is not None and not path.stat().st_size:
            _create(path)
        connect(uri).search_experiments(max_results=1)


def _create(database: Path) -> None:
    """Make MLflow's tables beside ``database``, which then replaces it: MLflow cannot use a file whose creation was
    interrupted."""
    remove_partials(database.parent, lambda name: name.startswith(database.name))  # and its journal
    with atomic_path(database) as temporary:
        connect(f"{_SQLITE}{temporary}").search_experiments(max_results=1)


def _check_writable(database: Path) -> None:
    """MLflow retries for two minutes to open a database, so try first."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"cannot write the MLflow database {database}: {error.strerror}") from None


def _creation_lock(database: Path | None) -> contextlib.AbstractContextManager[object]:
    """MLflow creates its tables when an SQLite file is first used, which fails if two processes do so at once."""
    return FileLock(database.with_name(f".{database.name}.lock")) if database else contextlib.nullcontext()


def _probe(uri: str) -> None:
    """Ask for the server's health with a short time limit: the client would wait much longer for one that hangs."""
    try:
        urllib.request.urlopen(f"{redact(uri)}/health", timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # MLflow's client has settings of its own for certificates
            raise UserError(f"MLflow at {redact(uri)} does not answer ({reason})") from error


def find_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """The run ``run_id``.

    Raises:
        UserError: it does not exist, or was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"MLflow at {redact(uri)} has no run {run_id}, to which this training belongs; give the tracking URI it"
            " was started with, or train under another --name"
        ) from None
    if run.info.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow run {run_id} was deleted: `mlflow runs restore --run-id {run_id}`, or train under another --name"
        )
    return run


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The exceptions of MLflow's client and of clients of artifact stores when a server is unreachable or refuses."""
    configure()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    found: list[type[Exception]] = [MlflowException, SQLAlchemyError, OSError]
    with contextlib.suppress(ImportError):
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        found += [Boto3Error, BotoCoreError, ClientError]
    return tuple(found)


@contextlib.contextmanager
def as_user_errors(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and its artifact stores, and a missing package for one of these, as UserError."""
    known: tuple[type[Exception], ...] = (*mlflow_errors(), ImportError)
    try:
        yield
    except OutboxBusy as error:
        raise UserError(str(error)) from error
    except known as error:
        raise UserError(f"MLflow at {redact(uri)} cannot be used ({brief(error)})") from error
