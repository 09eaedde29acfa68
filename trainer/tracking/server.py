"""The MLflow server or SQLite file that a run is tracked in: its URI, a client, whether it answers, its errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from catgan.command import UserError
from catgan.files import atomic_path, remove_partials
from trainer.tracking.messages import brief, redact
from trainer.tracking.outbox import OutboxBusy

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

_PROBE_SECONDS = 10.0
_SQLITE = re.compile(r"sqlite(\+pysqlite)?:///")
_DATABASES = ("postgresql", "mysql", "mssql")
_SQLITE_HEADER = b"SQLite format 3\0"

# Module and base class of the errors of clients of artifact stores that are not OSErrors.
_STORE_ERRORS = (
    ("boto3.exceptions", "Boto3Error"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.api_core.exceptions", "GoogleAPIError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def resolve_uri(uri: str | None, out: Path) -> str:
    """The tracking URI: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in ``out``. SQLite paths become
    absolute, since workers have other working directories.

    Raises:
        UserError: a ``file:`` URI or a plain path, which MLflow no longer supports, an SQLite URI without a path, or a
            path that is not UTF-8.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(out).resolve() / "mlflow.db")
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"tracking URI {uri} is a file store, which MLflow no longer supports; give sqlite:///PATH.db or"
            " http://HOST:PORT, and copy old runs with `mlflow migrate-filestore --source OLD --target"
            " sqlite:///PATH.db`"
        )
    path = sqlite_path(uri)
    if path is None and uri.startswith("sqlite"):
        raise UserError(f"tracking URI {uri}: give sqlite:///PATH.db, or sqlite:////PATH.db for an absolute path")
    return uri if path is None else sqlite_uri(path)


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite file.

    SQLAlchemy decodes ``%XX`` in it and ends the path at ``?``, so both characters are encoded. MLflow does not decode
    a URI that begins with ``sqlite:///`` when it makes the file's folder, so such a URI names the driver as well.

    Raises:
        UserError: the path is not UTF-8.
    """
    text = _utf8(path)
    encoded = text.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{text}" if encoded == text else f"sqlite+pysqlite:///{encoded}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite URI's file; None for any other URI."""
    match = _SQLITE.match(uri)
    return Path(unquote(uri[match.end() :].partition("?")[0])).resolve() if match else None


def artifact_location(folder: Path) -> str:
    """A local folder as the artifact location of an experiment, which MLflow decodes and parses like a URL."""
    return re.sub(r"[%?#\t\r\n]", lambda found: quote(found[0]), _utf8(folder))


def _utf8(path: Path) -> str:
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{text}: MLflow cannot use a path that is not UTF-8; give another --out, or a server as --track.uri"
        ) from None
    return text


def mlflow_command(uri: str, *args: str) -> str:
    """The command ``mlflow ARGS`` for the server at ``uri``, for a shell."""
    command = f"`MLFLOW_TRACKING_URI={shlex.quote(redact(uri))} {shlex.join(['mlflow', *args])}`"
    return command if redact(uri) == uri else f"{command} (add the user and password to the address)"


def server_name(uri: str) -> str:
    """The server in messages: its address, and the variable with the proxy through which it is reached, if any."""
    variable = _proxy_variable(uri)
    return f"MLflow at {redact(uri)}" + (f" through the proxy in {variable}" if variable else "")


def _proxy_variable(uri: str) -> str | None:
    """The environment variable with the proxy that MLflow's client, which is requests, takes for ``uri``."""
    scheme = uri.partition("://")[0]
    if scheme not in ("http", "https"):
        return None
    from requests.utils import should_bypass_proxies  # on use: mlflow, which needs it too, takes seconds

    if should_bypass_proxies(redact(uri), no_proxy=None):
        return None
    for kind in (f"{scheme}_proxy", "all_proxy"):
        for variable in (kind, kind.upper()):
            if os.environ.get(variable):
                return variable
    return None


def with_password(uri: str) -> str:
    """``uri`` with the user and password that MLFLOW_TRACKING_URI has for it, if any. URIs in files and in messages to
    workers have none."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if redact(given) == uri else uri


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
        if uri.startswith(_DATABASES):
            _probe_database(uri)
        if path is not None and not path.stat().st_size:
            _create(path)
        connect(uri).search_experiments(max_results=1)


def _create(database: Path) -> None:
    """Make MLflow's tables beside ``database``, which then replaces it: MLflow cannot use a file whose creation was
    interrupted."""
    remove_partials(database.parent, lambda name: name.startswith(database.name))  # and its journal
    with atomic_path(database) as temporary:
        connect(sqlite_uri(temporary)).search_experiments(max_results=1)


def _check_writable(database: Path) -> None:
    """MLflow retries for two minutes to open a database, so try first."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.open("ab+") as file:
            file.seek(0)
            header = file.read(len(_SQLITE_HEADER))
    except OSError as error:
        raise UserError(f"cannot write the MLflow database {database}: {error.strerror}") from None
    if header not in (b"", _SQLITE_HEADER):
        raise UserError(f"{database} is not an SQLite database; move it away, or give another --track.uri")


def _creation_lock(database: Path | None) -> contextlib.AbstractContextManager[object]:
    """MLflow creates its tables when an SQLite file is first used, which fails if two processes do so at once."""
    return FileLock(database.with_name(f".{database.name}.lock")) if database else contextlib.nullcontext()


def _probe(uri: str) -> None:
    """Ask for the server's health with a short time limit: MLflow's client waits much longer for one that hangs."""
    import requests

    try:
        requests.get(f"{redact(uri).rstrip('/')}/health", timeout=_PROBE_SECONDS).close()
    except requests.exceptions.SSLError:
        pass  # MLflow's client has settings of its own for certificates
    except (requests.RequestException, OSError) as error:
        direct = f"; NO_PROXY={urlsplit(uri).hostname} avoids the proxy" if _proxy_variable(uri) else ""
        raise UserError(f"{server_name(uri)} does not answer ({brief(error)}){direct}") from error


def _probe_database(uri: str) -> None:
    """Connect once: MLflow retries for two minutes."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    with engine.connect():
        pass
    engine.dispose()


def find_run(client: MlflowClient, uri: str, run_id: str) -> Run:
    """The run ``run_id``.

    Raises:
        UserError: it does not exist, or it or its experiment was deleted.
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
    check_experiment(
        client.get_experiment(run.info.experiment_id), uri, "train under another --track.experiment and --name"
    )
    if run.info.lifecycle_stage == "deleted":
        restore = mlflow_command(uri, "runs", "restore", "--run-id", run_id)
        raise UserError(f"MLflow run {run_id} was deleted: {restore} restores it, or train under another --name")
    return run


def check_experiment(experiment: Experiment, uri: str, otherwise: str = "give another --track.experiment") -> None:
    """Raise UserError if the experiment was deleted; ``otherwise`` is what to do instead of restoring it."""
    if experiment.lifecycle_stage == "deleted":
        restore = mlflow_command(uri, "experiments", "restore", "--experiment-id", experiment.experiment_id)
        raise UserError(
            f"MLflow experiment {experiment.name} was deleted: {restore} restores it and its runs, or {otherwise}"
        )


def find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment, created if there is none. With an SQLite file, its artifacts go to ``mlartifacts`` in
    the same folder.

    Raises:
        UserError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_path(uri)
        location = None if database is None else artifact_location(database.parent / "mlartifacts")
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another training may have created it in the meantime.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    check_experiment(found, uri)
    return str(found.experiment_id)


def mlflow_errors() -> tuple[type[Exception], ...]:
    """The exceptions of MLflow's client and of clients of artifact stores when a server is unreachable or refuses, or
    if the package of a client is missing. To be called when one is raised: it knows the clients in use by then."""
    configure()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    in_use = ((sys.modules.get(module), name) for module, name in _STORE_ERRORS)
    of_stores = (getattr(module, name, None) for module, name in in_use)
    return (
        MlflowException,
        SQLAlchemyError,
        OSError,
        ImportError,
        *(error for error in of_stores if error is not None),
    )


@contextlib.contextmanager
def as_user_errors(uri: str) -> Iterator[None]:
    """Raise errors of MLflow and its artifact stores as UserError."""
    try:
        yield
    except OutboxBusy as error:
        raise UserError(str(error)) from error
    except mlflow_errors() as error:
        raise UserError(f"{server_name(uri)} cannot be used ({brief(error)})") from error
