"""100,000 requests to ``catinfer serve``: its memory stays what it was after the first ones."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.infer.served import Served, served

REQUESTS = 100_000
WARM_UP = 20_000
CLIENTS = 16
MAX_GROWTH = 8 << 20  # bytes: a leak of 100 bytes per request is found
# A small cache is full after the warm-up.
BEFORE = "import infer.service.answers as a; a.CACHE_BYTES = 2**19"


def _requests(seed: int) -> Iterator[tuple[bytes, int]]:
    """Endless (request, expected status): mostly cheap ones, one in ten computes an image that nobody asked for yet."""
    choose = random.Random(seed)
    fresh = itertools.count()
    kinds = ["known", "cached", "new", "wrong", "missing", "page", "metrics", "grid", "walk", "leave", "head", "post"]
    weights = [480, 240, 100, 50, 30, 40, 5, 5, 2, 5, 30, 13]
    while True:
        kind = choose.choices(kinds, weights)[0]
        seed = choose.randrange(100) if kind in ("known", "cached", "head") else 1000 + next(fresh)
        path, method, header, status = f"/image?seed={seed}", "GET", "", 200
        match kind:
            case "known":
                header, status = "If-None-Match: *\r\n", 304
            case "wrong":
                path, status = f"/image?seed=-{seed}", 400
            case "missing":
                path, status = f"/nothing/{seed}", 404
            case "page" | "metrics":
                path = "/index.html" if kind == "page" else "/metrics"
            case "grid":
                path = f"/grid?seed={seed}&n=40&format=webp"
            case "walk" | "leave":
                path, status = f"/walk?seeds={seed},{seed + 1}", 200 if kind == "walk" else 0
            case "head" | "post":
                method, status = kind.upper(), 200 if kind == "head" else 405
        yield f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode(), status


async def _ask(server: Served, requests: Iterator[tuple[bytes, int]], found: Counter[int]) -> None:
    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for request, expected in requests:
            writer.write(request)
            if not expected:  # leave before the answer
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                continue
            header = await reader.readuntil(b"\r\n\r\n")
            status = int(header[9:12])
            length = re.search(rb"content-length: (\d+)", header)
            if length and not request.startswith(b"HEAD"):
                await reader.readexactly(int(length[1]))
            assert status == expected, (request, header)
            found[status] += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


@pytest.mark.soak
@pytest.mark.slow
def test_memory_is_constant(tmp_path: Path, build_onnx: Callable[..., bytes]) -> None:
    (tmp_path / "index.html").write_text("the page")
    (tmp_path / "gen.onnx").write_bytes(build_onnx())
    with served(tmp_path, before=BEFORE) as server:
        process = psutil.Process(server.process.pid)
        requests, found = _requests(0), Counter[int]()
        asyncio.run(_ask(server, itertools.islice(requests, WARM_UP), found))
        before, files = process.memory_info().rss, process.num_fds()
        asyncio.run(_ask(server, itertools.islice(requests, REQUESTS - WARM_UP), found))
        after = process.memory_info().rss
        print(f"{before >> 10} KiB after {WARM_UP:,} requests, {after >> 10} KiB after {REQUESTS:,}: {dict(found)}")
        assert after - before < MAX_GROWTH
        assert process.num_fds() <= files + 5
        assert sum(found.values()) > 0.99 * REQUESTS
        assert server.metric("catinfer_images_total") > 0.1 * REQUESTS
        assert server.metric("catinfer_queue_requests") == 0
        assert server.metric("catinfer_requests_total", status="500") == 0
