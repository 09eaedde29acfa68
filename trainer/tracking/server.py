"""MLflow's address, a client of it, and whether it answers."""

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
from trainer.tracking.outbox import Busy, brief, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_PROBE_SECONDS = 10.0
_SQLITE = "sqlite:///"


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
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{path}"


def with_password(uri: str) -> str:
    """``uri`` with the user and password that MLFLOW_TRACKING_URI has for it, if it does: what is written down, or
    travels to workers, has none."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if redact(given) == uri else uri


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for anything else."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).resolve() if uri.startswith(_SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """A quiet client of the tracking server and registry at ``uri``."""
    _configure()
    # Imported here because it takes about two seconds, which only rank 0 and the driver need to spend.
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)


def _configure() -> None:
    """MLflow reads these when it is imported: do not try again for minutes, since the outbox does, keep quiet, send
    nothing to its makers. What the user has set wins."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def reach(uri: str) -> None:
    """Look whether MLflow answers, within seconds.

    Raises:
        UserError: no.
    """
    path = sqlite_path(uri)
    if path is not None:
        _prepare_sqlite(path)
    if uri.startswith(("http://", "https://")):
        _probe(uri)
    with as_user_errors(uri), _alone_with(path):
        connect(uri).search_experiments(max_results=1)


def _alone_with(database: Path | None) -> contextlib.AbstractContextManager[object]:
    """MLflow makes its tables at the first use of an SQLite file; two trainings that do so at once fail."""
    return FileLock(database.with_name(f".{database.name}.lock")) if database else contextlib.nullcontext()


def _probe(uri: str) -> None:
    """A server that hangs would hold us up for MLflow's whole time limit."""
    try:
        urllib.request.urlopen(f"{redact(uri)}/health", timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # which certificates are good is for MLflow's client to say
            raise UserError(f"MLflow at {redact(uri)} does not answer ({reason})") from error


def find_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """The run ``run_id``.

    Raises:
        UserError: MLflow does not know it, or it was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"MLflow at {redact(uri)} has no run {run_id}, which this training belongs to; give the tracking URI it"
            " was started with, or train under another --name"
        ) from None
    if run.info.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow run {run_id} was deleted: `mlflow runs restore --run-id {run_id}`, or train under another --name"
        )
    return run


def failures() -> tuple[type[Exception], ...]:
    """What clients of MLflow and of its artifact stores raise when they cannot reach or use them."""
    _configure()
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
    """MLflow's failures inside become the user's to mend."""
    known: tuple[type[Exception], ...] = (*failures(), ImportError)
    try:
        yield
    except Busy as error:
        raise UserError(str(error)) from error
    except known as error:
        raise UserError(f"MLflow at {redact(uri)} cannot be used ({brief(error)})") from error


def _prepare_sqlite(path: Path) -> None:
    """MLflow retries for two minutes on a database it cannot open, so look first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"cannot write the MLflow database {path}: {error.strerror}") from None
