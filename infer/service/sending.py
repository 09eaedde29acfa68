"""Sends large answers to clients that may read them slowly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PART = 65_536  # bytes; uvicorn waits between parts, so that a connection holds about two of them
SECONDS = 30.0  # to read an answer, and more for large ones:
LEAST_RATE = 2**18  # bytes per second


class TooSlow(Exception):
    """The client did not read its answer in time."""


class ImageResponse(Response):
    """An answer that is sent in parts. Its content stays in memory until the client has read it.

    Args:
        account: makes a context, for the number of bytes, in which they are sent.
    """

    def __init__(
        self,
        content: bytes,
        headers: dict[str, str],
        media_type: str,
        account: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._account = account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = len(self.body)
        with self._account(size):
            try:
                async with asyncio.timeout(SECONDS + size / LEAST_RATE):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    for start in range(0, size, PART):
                        part = bytes(self.body[start : start + PART])
                        await send({"type": "http.response.body", "body": part, "more_body": start + PART < size})
            except TimeoutError as error:
                raise TooSlow from error
