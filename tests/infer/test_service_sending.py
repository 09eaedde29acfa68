"""Answers are sent in parts, as fast as the client reads them, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.types import Message

from infer.service import sending
from infer.service.sending import PART, ImageResponse, TooSlow


class Account:
    """Counts the bytes that are being sent now."""

    def __init__(self) -> None:
        self.now = 0

    @contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        self.now += size
        try:
            yield
        finally:
            self.now -= size


async def _receive() -> Message:
    raise AssertionError("nothing is read")


@pytest.mark.parametrize("size", [1, PART - 1, PART, PART + 1, 3 * PART])
def test_an_answer_is_sent_in_parts(size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    account, messages = Account(), []

    async def send(message: Message) -> None:
        assert account.now == size
        messages.append(message)

    asyncio.run(ImageResponse(content, {"ETag": '"1"'}, "image/png", account)({"type": "http"}, _receive, send))
    start, *parts = messages
    assert dict(start["headers"]) == {
        b"etag": b'"1"', b"content-length": str(size).encode(), b"content-type": b"image/png"
    }  # fmt: skip
    assert b"".join(part["body"] for part in parts) == content
    assert max(len(part["body"]) for part in parts) <= PART
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
    assert account.now == 0


def test_a_client_has_a_limited_time_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SECONDS", 0.05)
    account, sent = Account(), []

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()

    with pytest.raises(TooSlow):
        asyncio.run(ImageResponse(bytes(5 * PART), {}, "image/png", account)({"type": "http"}, _receive, send))
    assert len(sent) == 3
    assert account.now == 0
