"""The generators in an MLflow model registry, through MLflow's REST API: the mlflow package is not needed.

The server and its answers are not trusted: they are limited in size and time, and names are made printable. Redirects
are not followed, since they could lead a password elsewhere.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from catgan.text import printable

T = TypeVar("T", str, list)

SECONDS = 5.0
"""Time for all requests together."""
MAX_MODELS = 100
"""Most generators that are found."""

_MAX_BYTES = 4 * 2**20  # of one answer: 100 models with descriptions as long as MLflow allows have about a quarter
_PAGES = 20  # of 100 registered models
_MAX_NAME = 256  # as in MLflow's tables
_MAX_VALUE = 200  # characters of a tag that are kept
_FILE_TAG = "onnx_sha256"  # that export.registry gives to versions


class Unavailable(Exception):
    """The registry cannot be used. The message names its address and the reason, and has no password."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model that is a generator of catgan."""

    model: str
    """``models:/NAME@ALIAS``, or ``models:/NAME/VERSION`` if it has no alias; printable."""
    tags: Mapping[str, str]
    """Those of the version, which have the keys of an ONNX file's metadata; printable, at most 200 characters each."""
    download: str
    """The address of its ONNX file."""
    command: str
    """A command for a shell that downloads the file with curl and generates images from it."""


def find(address: str) -> list[Registered]:
    """The generators in the registry at ``address``: versions with an alias, and the latest one of each model.

    Args:
        address: of an MLflow server, ``http://`` or ``https://``. A user and password in it go before those in
            ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``, and these before ``MLFLOW_TRACKING_TOKEN``.

    Raises:
        Unavailable: the server does not answer within ``SECONDS``, refuses, or is not MLflow.
    """
    outcome: list[list[Registered] | str] = []  # what was found, or why nothing was

    def ask() -> None:
        try:
            outcome.append(_search(_Server(address)))
        except (ValueError, RecursionError):
            outcome.append("its answer is not one of MLflow's")
        except (OSError, HTTPException) as error:
            outcome.append(_reason(error))

    # A thread: a socket's time limit covers neither the look-up of a name nor a server that sends a byte now and then.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    (found,) = [f"no complete answer within {SECONDS:g} s"] if thread.is_alive() else outcome
    if isinstance(found, str):
        shown = re.sub(r"//.*@", "//...@", address)  # greedy: a password may have an @ that should have been encoded
        raise Unavailable(f"the registry of MLflow at {shown} cannot be read ({found})")
    return found


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Make a redirect an HTTPError."""


class _Server:
    """An MLflow server. Raises OSError for what is not an address."""

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
            # An @ behind the host is of a password with a / that should have been encoded.
            valid = parts.port != 0 and re.fullmatch("[!-~]+", address) and "@" not in parts.path
        except ValueError:
            valid = None
        if not valid:
            raise OSError("not a valid address")
        self.root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._headers, self.curl = _credentials(address, parts.username, parts.password)
        self._opener = build_opener(_NoRedirects)

    def ask(self, path: str, **query: str) -> dict[str, Any]:
        """The answer of ``/api/2.0/mlflow/PATH``. Raises OSError, HTTPException and ValueError."""
        request = Request(f"{self.root}/api/2.0/mlflow/{path}?{urlencode(query)}", headers=self._headers)
        with self._opener.open(request, timeout=2 * SECONDS) as answer:
            data = answer.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise OSError(f"an answer of more than {_MAX_BYTES:,} bytes")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value


def _credentials(address: str, user: str | None, password: str | None) -> tuple[dict[str, str], str]:
    """The header with credentials, from an address or else from the environment as in MLflow's client, and the options
    with which curl takes the latter. Those of the environment are for the servers that it names."""
    named = [os.environ.get(name, "") for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")]
    if user is None and _origin(address) not in map(_origin, named):
        return {}, ""
    variables = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
    pair, options = (unquote(user or ""), unquote(password or "")), ""
    if user is None:
        pair = os.environ.get(variables[0], ""), os.environ.get(variables[1], "")
        options = f'-u "${variables[0]}:${variables[1]}" '
    if all(pair) or user:
        return {"Authorization": f"Basic {base64.b64encode(':'.join(pair).encode()).decode()}"}, options
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        if not (token.isascii() and token.isprintable()):
            raise OSError("MLFLOW_TRACKING_TOKEN has characters that are not allowed in a header")
        return {"Authorization": f"Bearer {token}"}, '--oauth2-bearer "$MLFLOW_TRACKING_TOKEN" '
    return {}, ""


def _origin(address: str) -> tuple[str | int | None, ...]:
    try:
        parts = urlsplit(address)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        return ()


def _search(server: _Server) -> list[Registered]:
    found: list[Registered] = []
    broken: ValueError | None = None
    query = {"max_results": "100"}
    for _ in range(_PAGES):
        answer = server.ask("registered-models/search", **query)
        for model in _field(answer, "registered_models", list):
            try:
                found += _of_model(server, model)
            except ValueError as error:  # the others are listed
                broken = error
            if len(found) >= MAX_MODELS:
                return found[:MAX_MODELS]
        query["page_token"] = _field(answer, "next_page_token", str)
        if not query["page_token"]:
            break
    if broken and not found:
        raise broken
    return found


def _of_model(server: _Server, model: object) -> Iterator[Registered]:
    """The generators among the versions of a registered model: those with an alias, then the latest one."""
    name = _name(model, "name")
    versions = {_version(one): _tags(one) for one in _field(model, "latest_versions", list)}
    latest = [max(versions, key=int)] if versions else []
    aliases: dict[str, str] = {}
    for alias in _field(model, "aliases", list):
        aliases.setdefault(_version(alias), _name(alias, "alias"))
    for version in dict.fromkeys([*aliases, *latest]):
        if version not in versions:
            versions[version] = _tags(server.ask("model-versions/get", name=name, version=version).get("model_version"))
        if _FILE_TAG in versions[version]:
            reference = f"@{aliases[version]}" if version in aliases else f"/{version}"
            yield _registered(server, name, version, printable(f"models:/{name}{reference}"), versions[version])


def _registered(server: _Server, name: str, version: str, model: str, tags: Mapping[str, str]) -> Registered:
    # The page of a version downloads its files from here. The server fetches them from wherever they are stored.
    address = f"{server.root}/model-versions/get-artifact"
    query = urlencode({"name": name, "version": version, "path": "model.onnx"})
    file = f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-') or 'model'}-{version}.onnx"
    curl = f"curl -fG {server.curl}-d '{query}' -o {file} {shlex.quote(address)}"
    return Registered(model, tags, f"{address}?{query}", f"{curl} && catinfer --onnx {file}")


def _reason(error: Exception) -> str:
    """Why a request failed, as a short text without what was sent."""
    if isinstance(error, HTTPError):
        error.close()
        if error.code in (401, 403):
            return (
                f"HTTP {error.code}: set MLFLOW_TRACKING_URI to this address, and MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD"
            )
        redirects = ": it redirects; give the address that it leads to" if 300 <= error.code < 400 else ""
        return f"HTTP {error.code}{redirects}"
    cause = error.reason if isinstance(error, URLError) else error
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return " ".join(text.split())[:_MAX_VALUE]


# Parts of MLflow's answers, which omit what is empty. They raise ValueError for other types.


def _field(record: object, key: str, kind: type[T]) -> T:
    value = record.get(key, kind()) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise ValueError(key)
    return value


def _name(record: object, key: str) -> str:
    name = _field(record, key, str)
    if not 1 <= len(name) <= _MAX_NAME:
        raise ValueError(key)
    return name


def _version(record: object) -> str:
    version = _field(record, "version", str)
    if not re.fullmatch("[0-9]{1,9}", version):
        raise ValueError("version")
    return version


def _tags(record: object) -> dict[str, str]:
    tags = _field(record, "tags", list)
    return {_field(tag, "key", str): printable(_field(tag, "value", str))[:_MAX_VALUE] for tag in tags}
