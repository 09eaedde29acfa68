"""The service as an ASGI application."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catgan.command import UserError, say
from catgan.text import printable, to_json
from infer.service import pages
from infer.service.answers import Answers, QueueFull
from infer.service.batches import Batches
from infer.service.metrics import Metrics
from infer.service.model import Model
from infer.service.openapi import describe
from infer.service.parameters import TYPES, ImageRequest, QueryTooLong, image_request, parse_query, paths
from infer.service.sending import ImageResponse
from infer.service.tags import is_current

# The same address can serve another model tomorrow, and with `immutable` browsers do not ask again before this is over.
MAX_AGE = 300  # seconds
CLIENT_GONE = 499  # nobody reads it; for the metrics, as nginx calls it
_HEADERS = ((b"cross-origin-resource-policy", b"same-origin"), (b"x-content-type-options", b"nosniff"))
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Content:
    """What is served.

    Attributes:
        model: for the paths of the API; None to serve ``page`` alone.
        page: a folder without symbolic links in its path; None for the API alone.
        hosts: the names in the header ``Host`` that are answered; None for all.
    """

    model: Model | None
    page: Path | None
    hosts: frozenset[str] | None


def make_app(content: Content) -> ASGIApp:
    """The application. Each event loop needs one of its own."""
    metrics = Metrics()
    api = _Api(content.model, metrics) if content.model else None
    routes = [Route(path, handler) for path, handler in api.handlers().items()] if api else []

    async def other(request: Request) -> Response:
        if content.page and (found := pages.answer(content.page, request)):
            return found
        if api and request.scope["path"] == "/":
            return api.overview()
        hint = "; /openapi.json shows what there is" if api else ""
        raise HTTPException(404, f"no such path{hint}")

    app = Starlette(
        routes=[*routes, Route("/{path:path}", other)],
        exception_handlers={
            HTTPException: _on_status,
            UserError: _on_mistake,
            QueueFull: _on_full,
            Exception: _on_failure,
        },
        lifespan=api.lifespan if api else None,
    )
    return _Outside(app, content.hosts, frozenset(route.path for route in routes), metrics)


class _Api:
    """The paths of a generator."""

    def __init__(self, model: Model, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self._paths = paths(model.size, model.generator.classes)
        self._batches = Batches(model.generator, metrics)
        self._answers = Answers(model, self._batches, metrics)
        self._work: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._work = asyncio.create_task(self._batches.run())
        yield
        self._work.cancel()
        await asyncio.wait({self._work})
        self._answers.close()

    def handlers(self) -> dict[str, Callable[[Request], Any]]:
        plain = {
            "/info": self._info,
            "/healthz": self._health,
            "/metrics": self._text,
            "/openapi.json": self._description,
        }
        return {path: plain.get(path, self._images) for path in self._paths}

    def overview(self) -> Response:
        """The paths and their parameters, for people who open the address."""
        lines = []
        for path, known in self._paths.items():
            query = "&".join(f"{name}=" for name in known.parameters)
            lines.append(f"{path}{'?' if query else ''}{query}: {known.summary}")
        return PlainTextResponse("\n".join(lines) + "\n", headers={"Cache-Control": "no-cache"})

    async def _images(self, request: Request) -> Response:
        path = request.scope["path"]
        query = request.scope["query_string"].decode("ascii")
        asked = image_request(path, self._paths[path], query, self._model.generator.classes)
        headers = {"ETag": self._answers.tag(asked), "Cache-Control": f"public, max-age={MAX_AGE}, immutable"}
        if is_current(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        content = await self._get(asked, request)
        if content is None:
            return Response(status_code=CLIENT_GONE)
        return ImageResponse(content, headers, TYPES[asked.format], self._answers.sending)

    async def _get(self, asked: ImageRequest, request: Request) -> bytes | None:
        gone = asyncio.create_task(_gone(request.receive))
        try:
            return await self._answers.get(asked, gone)
        except UserError as error:
            say(f"{request.scope['path']}: {error}")
            raise HTTPException(500, "the generator failed; the server's log shows why") from error
        finally:
            gone.cancel()

    async def _info(self, request: Request) -> Response:
        self._check(request)
        limits = {
            path: {name: one.schema["maximum"] for name, one in known.parameters.items() if "maximum" in one.schema}
            for path, known in self._paths.items()
            if known.parameters
        }
        return _json({**self._model.info(), "limits": limits})

    async def _health(self, request: Request) -> Response:
        self._check(request)
        works = self._work is not None and not self._work.done()
        return _json({"status": "ok" if works else "the generator's task has ended"}, 200 if works else 503)

    async def _text(self, request: Request) -> Response:
        self._check(request)
        return Response(self._metrics.text(), media_type=_METRICS_TYPE, headers={"Cache-Control": "no-store"})

    async def _description(self, request: Request) -> Response:
        self._check(request)
        return _json(describe(self._paths, self._model.versions["catgan"]))

    def _check(self, request: Request) -> None:
        """Raise ``UserError`` for a query, since this path takes none."""
        parse_query(self._paths[request.scope["path"]], request.scope["query_string"].decode("ascii"))


async def _gone(receive: Receive) -> None:
    """Return when the client has gone. A body is read and ignored."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = to_json(value, ensure_ascii=False) + "\n"
    caching = {"Cache-Control": "no-cache" if status == 200 else "no-store"}
    return Response(content, status, {**caching, **(headers or {})}, media_type="application/json")


def _problem(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": printable(" ".join(message.split()))}, status, headers)


async def _on_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method}: not allowed here; use GET or HEAD" if error.status_code == 405 else error.detail
    return _problem(error.status_code, message, {"Allow": "GET, HEAD"} if error.status_code == 405 else None)


async def _on_mistake(request: Request, error: Exception) -> Response:
    if isinstance(error, QueryTooLong):
        return _problem(414, str(error))
    return _problem(400, str(error))


async def _on_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFull)
    return _problem(429, str(error), {"Retry-After": str(error.retry_after)})


async def _on_failure(request: Request, error: Exception) -> Response:
    return _problem(500, "the server failed; its log shows why")


class _Outside:
    """Checks ``Host``, adds headers, and counts and times each request."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, known: frozenset[str], metrics: Metrics) -> None:
        self._app, self._hosts, self._known, self._metrics = app, hosts, known, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        path = scope["path"] if scope["path"] in self._known else "other"
        try:
            await (self._app if self._is_ours(scope) else _on_foreign_host)(scope, receive, counted)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _is_ours(self, scope: Scope) -> bool:
        # A page from elsewhere can resolve its own name to 127.0.0.1 (DNS rebinding), but cannot forge this header.
        if self._hosts is None:
            return True
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        found = _HOST.fullmatch(given)
        return found is not None and found[1].lower() in self._hosts


async def _on_foreign_host(scope: Scope, receive: Receive, send: Send) -> None:
    message = "this server answers only requests to its own name; --host chooses another address"
    await _problem(403, message)(scope, receive, send)
