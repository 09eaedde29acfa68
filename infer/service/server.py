"""``catinfer serve``: the socket, uvicorn's limits, and the end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from catgan.command import UserError, say
from infer.service.app import Content, make_app
from infer.service.connection import Connection
from infer.service.model import load
from infer.service.pages import INDEX
from infer.service.sending import TooSlow

MODEL = "gen.onnx"
GRACE = 5  # seconds that requests have to end in
CONNECTIONS = 256  # twice as many may be open, far below the usual 1,024 files of a process
MAX_HEADER = 16_384  # bytes; the longest query is half of it
KEEP_ALIVE = 5  # seconds


def serve(target: str, host: str, port: int, device: str = "auto") -> dict[str, Any]:
    """Serve the model, run or page ``target`` until SIGINT or SIGTERM. Returns the JSON object of the command.

    Args:
        target: a generator's file, the folder of a run, or a folder with index.html, which may have a gen.onnx.
        host: the address to listen on. On a loopback address only requests to its own name are answered.
        port: 0 for any free one.
        device: see ``Generator``.

    Raises:
        UserError: there is nothing to serve, the model does not work, or the address cannot be used.
    """
    onnx, page = _find(target)
    listener = _listen(host, port)
    with listener:
        address = listener.getsockname()[0]
        name = f"[{address}]" if ":" in address else address
        url = f"http://{name}:{listener.getsockname()[1]}/"
        is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        model = load(onnx, device) if onnx else None
        app = make_app(Content(model, page, frozenset({name, "localhost"}) if is_loopback else None))
        say(f"{url} serves {target}, Ctrl-C stops it")
        if not is_loopback:
            say(
                f"warning: {url} has no authentication and no encryption: everybody who reaches it can use it; put a "
                "proxy that has both in front of it, or omit --host"
            )
        _run(app, listener)
    result = {"address": url}
    if page:
        result["folder"] = target
    if onnx:
        result["onnx"] = str(onnx)
    return result


def _find(target: str) -> tuple[Path | None, Path | None]:
    """(model, page) of ``target``; the page is its folder without symbolic links."""
    path = Path(target)
    if not path.exists():
        raise UserError(
            f"{target}: no such file or directory; give a gen.onnx, the folder of a run, or the page of "
            "`catexport --web DIR`"
        )
    if not path.is_dir():
        return path, None
    if (path / INDEX).is_file():
        return (path / MODEL if (path / MODEL).is_file() else None), path.resolve()
    if (best := path / "best" / MODEL).is_file():
        return best, None
    raise UserError(
        f"{target}: holds no {INDEX} and no best/{MODEL}; `catexport --web DIR` makes a page, a training makes a run"
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: not an address of this machine ({error}); try 127.0.0.1") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host}: not an address of this machine; try 127.0.0.1") from error
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"--port {port}: {reason}; choose another, or 0 for any free one") from error


def _run(app: Any, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then let requests end for ``GRACE`` seconds."""
    log = logging.getLogger("uvicorn.error")
    log.handlers, log.propagate = [_Log(logging.ERROR)], False
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
            h11_max_incomplete_event_size=MAX_HEADER,
        )
    )
    # uvicorn raises the signal again after it has ended, with the handler of before.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, before)
    say("stopped")


class _Log(logging.Handler):
    """Shows failures with their traceback. Bad requests, slow clients, and requests that the end cut off are none."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (asyncio.CancelledError, TooSlow)):
            return
        say(record.getMessage())
        if error is not None:
            say("".join(traceback.format_exception(error)))
