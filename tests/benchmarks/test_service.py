"""benchmarks/service.py at a tiny size: it compares both servers, and counts what it asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType

import pytest

from catgan.command import UserError

Script = Callable[[str], ModuleType]


@pytest.mark.soak
@pytest.mark.slow
def test_service_measures_both_servers(script: Script) -> None:
    service = script("service")
    result = service.main(["--recipe", "dcgan-cpu-32", "--clients", "1", "3", "--requests", "6"])
    assert [r["clients"] for r in result["results"]] == [1, 3]
    for one in result["results"]:
        speeds = one["requests_per_second"]
        assert one["ratio"] == pytest.approx(speeds[service.OURS] / speeds[service.NAIVE], rel=0.02)
        assert 0 < one["p50_ms"][service.OURS] <= one["p99_ms"][service.OURS]
    assert result["ratio"] == min(r["ratio"] for r in result["results"])


def _answer_with(*answers: bytes) -> tuple[list[bytes], Callable[[ModuleType, int], tuple[list[float], bytes]]]:
    """A server that gives ``answers`` in turn; the requests that it gets, and a function that asks it for seeds."""
    asked: list[bytes] = []

    def ask(service: ModuleType, clients: int) -> tuple[list[float], bytes]:
        async def scenario() -> tuple[list[float], bytes]:
            left = iter(answers)

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while request := await reader.readline():
                    await reader.readuntil(b"\r\n\r\n")
                    asked.append(request)
                    writer.write(next(left))
                writer.close()

            async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                result: tuple[list[float], bytes] = await service._ask_all(port, clients, iter(range(len(answers))))
                return result

        return asyncio.run(scenario())

    return asked, ask


def test_each_seed_is_asked_for_once(script: Script) -> None:
    asked, ask = _answer_with(*[b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\ncat"] * 7)
    seconds, content = ask(script("service"), 3)
    assert sorted(asked) == [b"GET /image?seed=%d HTTP/1.1\r\n" % seed for seed in range(7)]
    assert (len(seconds), content) == (7, b"cat")
    assert min(seconds) > 0


def test_an_answer_that_is_no_image_ends_it(script: Script) -> None:
    _, ask = _answer_with(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
    with pytest.raises(UserError, match=r"a server answered HTTP/1.1 429 Too Many Requests"):
        ask(script("service"), 1)


def test_unknown_options_are_named(script: Script) -> None:
    with pytest.raises(UserError, match="--frobnicate"):
        script("service").main(["--frobnicate", "1"])
