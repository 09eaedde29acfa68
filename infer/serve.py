"""``catinfer serve``: serves a static folder, such as the page of ``catexport --web``, to browsers on this machine."""

from __future__ import annotations

import errno
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from catgan.command import UserError, say

HOST = "127.0.0.1"
INDEX = "index.html"

# Python's defaults come from the machine, where types can be missing or, on Windows, wrong.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}

_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def serve(folder: str, port: int) -> dict[str, Any]:
    """Serve ``folder`` on 127.0.0.1 until interrupted. Port 0 means any free port. Raises ``UserError``."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such directory; `catexport --web DIR` makes a page to serve")
    if not (root / INDEX).is_file():
        raise UserError(f"{folder}: holds no {INDEX}; `catexport --web DIR` makes a page to serve")
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(root.resolve())))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from error
    address = f"http://{HOST}:{server.server_port}/"
    with server:
        say(f"{address} serves {folder}, Ctrl-C stops it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
    return {"address": address, "folder": folder}


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of the files in the folder: no listings, and no links to places outside it."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **_TYPES}  # noqa: RUF012, as in the base class
    server_version, sys_version = "catinfer", ""
    timeout = 30

    def send_head(self) -> Any:
        # A page from elsewhere can resolve its own name to 127.0.0.1 (DNS rebinding), but cannot forge this header.
        host = self.headers.get("Host", "")
        if host.partition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        try:
            path = Path(self.translate_path(self.path)).resolve()
            inside = path.is_relative_to(self.directory)
        except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a NUL
            inside = False
        if not inside:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> IO[bytes] | None:  # type: ignore[override]
        self.send_error(HTTPStatus.NOT_FOUND)
        return None

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Files are not logged; errors are."""
