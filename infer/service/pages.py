"""The files of a folder, such as the page of ``catexport --web``: no listings, no hidden files such as ``.env``, and no
links out of the folder."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from infer.service.tags import is_current

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


def answer(root: Path, request: Request) -> Response | None:
    """The file below ``root``, a path without symbolic links, that the path of ``request`` names, or None."""
    path = request.scope["path"]
    names = [name for name in path.split("/") if name not in ("", ".")]
    if any(name.startswith(".") for name in names):
        return None
    try:
        found = (root / Path(*names)).resolve()
        if found.is_relative_to(root) and found.is_dir():
            if not path.endswith("/"):
                return RedirectResponse("/" + "".join(f"{quote(name)}/" for name in names), 301)
            found = (found / INDEX).resolve()
        status = found.stat()
    except (OSError, RuntimeError, ValueError):  # missing, a name too long, a loop of links, a NUL
        return None
    if not found.is_relative_to(root) or not stat.S_ISREG(status.st_mode):
        return None
    kind = _TYPES.get(found.suffix.lower(), "application/octet-stream")
    file = FileResponse(found, headers={"Cache-Control": "no-cache"}, media_type=kind, stat_result=status)
    if is_current(request, file.headers["etag"]):
        return Response(status_code=304, headers={"Cache-Control": "no-cache", "ETag": file.headers["etag"]})
    return file
