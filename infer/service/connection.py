"""uvicorn's HTTP/1.1 connection with limits for slow clients."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10.0  # seconds
LEAST = 16_384  # bytes that a client has to read in this time, if there are so many


class Connection(H11Protocol):
    """Closed if its client neither sends a whole request header nor reads its answer for ``PATIENCE`` to twice as long.

    uvicorn's own time limit is for connections without any incoming data between two requests. It waits without limit
    for the rest of a header, for a first request and for an answer to be read, so that a few hundred such clients would
    occupy all connections.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Header and content are written apart from each other: without this, a client's delayed acknowledgement of the
        # header holds the content up for 40 ms. asyncio does it for sockets that it opens itself only.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._seen: Any = None  # the request at the last check
        self._unread = 0  # bytes at the last check
        self._has_drained = False
        self._timer = self.loop.call_later(PATIENCE, self._check)
        # Above limit_concurrency a request is answered with status 503. Those who do not even send one use up files.
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._has_drained = True
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # its answer may have begun
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def _check(self) -> None:
        unread = self.transport.get_write_buffer_size()
        is_computing = self.cycle is not None and not self.cycle.response_complete and not unread
        has_advanced = self.cycle is not self._seen or self._has_drained or unread <= self._unread - LEAST
        if not is_computing and not has_advanced:
            self.transport.abort()
            return
        self._seen, self._unread, self._has_drained = self.cycle, unread, False
        self._timer = self.loop.call_later(PATIENCE, self._check)
