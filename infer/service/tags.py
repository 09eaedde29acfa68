"""Entity tags (RFC 9110, section 13.1.2)."""

from __future__ import annotations

import re

from starlette.requests import Request

_TAG = re.compile(r'\*|(?:W/)?("[^"]*")')


def is_current(request: Request, tag: str) -> bool:
    """Whether the client already has the content with the entity tag ``tag``: an answer with status 304 is enough."""
    given = ",".join(request.headers.getlist("if-none-match"))
    return any(found[0] == "*" or found[1] == tag for found in _TAG.finditer(given))
