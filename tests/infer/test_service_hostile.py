"""Clients of ``catinfer serve`` that send nonsense, too much, too slowly, or leave.

It stays healthy and shows no traceback (``Served.stop`` checks that)."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infer.service.answers import MAX_REQUESTS
from tests.infer.served import Reply, Served, read_all, served

IMPATIENT = "import infer.service.connection as c; c.PATIENCE = 0.4"
HEAD = b"HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, build_onnx: Callable[..., bytes]) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("the page")
    (folder / "large.bin").write_bytes(bytes(30 << 20))  # more than sockets buffer
    (folder / "gen.onnx").write_bytes(build_onnx())
    return folder


@pytest.fixture(scope="module")
def server(page: Path) -> Iterator[Served]:
    with served(page, before=IMPATIENT) as server:
        yield server


@pytest.fixture(autouse=True)
def _stays_healthy(server: Served) -> Iterator[None]:
    yield
    assert server.get("/healthz").status == 200
    assert server.get("/image?seed=1").body.startswith(b"\x89PNG")


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), 400),  # TLS
        (b"GET\r\n\r\n", 400),
        (b"GET /im age HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /image HTTP/1.1\r\n\r\n", 400),
        (b"GET /image " + HEAD + b"Host: localhost\r\n\r\n", 400),
        (b"GET /image " + HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (b"GET /image " + HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /image " + HEAD + b"bad header\r\n\r\n", 400),
        (b"GET http://localhost/image " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"GET /../../etc/passwd " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"GET /%2e%2e/%2e%2e/etc/passwd " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"GET /%00%ff%zz " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"OPTIONS * " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"CONNECT evil.example:443 " + HEAD + b"Connection: close\r\n\r\n", 404),
        (b"BREW /image " + HEAD + b"Connection: close\r\n\r\n", 405),
        (b"GET /image?psi=nan " + HEAD + b"Connection: close\r\n\r\n", 400),
        (b"GET /image HTTP/1.0\r\n\r\n", 403),
        (b"GET /image HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /image " + HEAD + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"GET /large.bin " + HEAD + b"Connection: close\r\nRange: bytes=5-1\r\n\r\n", 400),
        (b"GET /large.bin " + HEAD + b"Connection: close\r\nRange: bytes=99999999-\r\n\r\n", 416),
    ],
)  # fmt: skip
def test_a_bad_request_gets_one_answer(server: Served, data: bytes, status: int) -> None:
    answer = server.send(data)
    assert statuses(answer) == [status]
    assert b"root:" not in answer
    assert b"Traceback" not in answer


@pytest.mark.parametrize("part", [b"X: y\r\n", b"x"], ids=["lines", "one line"])
@pytest.mark.parametrize("start", [b"", b"GET /image?seed=", b"GET /image " + HEAD], ids=["nothing", "query", "header"])
def test_a_header_without_end_is_refused(server: Served, start: bytes, part: bytes) -> None:
    with server.connect() as connection:
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall(start)
            while sent < 50_000_000:
                connection.sendall(part * 1000)
                sent += len(part) * 1000
        assert sent < 50_000_000
        assert statuses(read_all(connection)) in ([400], [])


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_long_query_or_header_is_answered_or_refused(server: Served, size: int) -> None:
    """The limit of h11 holds while a header is incomplete, so it depends on how the parts come."""
    close = b"Connection: close\r\n"
    assert statuses(server.send(b"GET /image?seed=" + b"1" * size + b" " + HEAD + close + b"\r\n")) in (
        [414],
        [400],
        [],
    )
    assert statuses(server.send(b"GET /image " + HEAD + close + b"X: y\r\n" * (size // 6) + b"\r\n")) in (
        [200],
        [400],
        [],
    )


def test_bodies_are_ignored(server: Served) -> None:
    form = b"Content-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n"
    body = b"seed=1&" * 300_000
    with server.connect() as connection:
        connection.sendall(b"POST /image " + HEAD + form + b"Content-Length: %d\r\n\r\n" % len(body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(body)
        assert statuses(connection.recv(65536) or b"HTTP/1.1 405 ") == [405]
    small = server.send(b"GET /image " + HEAD + b"Connection: close\r\nContent-Length: 6\r\n\r\nseed=5")
    assert statuses(small) == [200]
    assert server.get("/image").body in small
    broken = server.send(b"GET /grid " + HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a chunk\r\n\r\n")
    assert statuses(broken) in ([], [200], [400])


def test_a_body_that_never_ends_is_cut_off(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /image " + HEAD + b"Content-Length: 1000000000\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < 10:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 10


def test_pipelined_requests_are_answered_in_order(server: Served) -> None:
    seeds = [*range(20), *range(5)]
    requests = [b"GET /image?seed=%d&format=npy " % seed + HEAD + b"\r\n" for seed in seeds]
    answer = server.send(b"".join(requests) + b"GET /none " + HEAD + b"Connection: close\r\n\r\n")
    assert statuses(answer) == [200] * len(seeds) + [404]
    tags = re.findall(rb'etag: ("\w+")', answer)
    assert tags == [server.get(f"/image?seed={seed}&format=npy").headers["ETag"].encode() for seed in seeds]


def test_clients_that_send_slowly_or_nothing_are_closed(server: Served) -> None:
    silent = [server.connect() for _ in range(100)]
    partial = [server.connect() for _ in range(100)]
    for connection in partial:
        connection.sendall(b"GET /image HTT")
    began = time.monotonic()
    assert server.get("/image?seed=3").status == 200
    left = [*silent, *partial]
    while left and time.monotonic() - began < 10:
        for connection in partial[:5]:  # one byte at a time is no progress
            try:
                connection.sendall(b"x")
            except OSError:
                break
        ready, _, _ = select.select(left, [], [], 0.05)
        for connection in ready:
            assert read_all(connection) == b""
            left.remove(connection)
    assert left == []
    for connection in [*silent, *partial]:
        connection.close()


def test_clients_that_do_not_read_are_closed(server: Served) -> None:
    with server.connect() as stuck, server.connect() as slow:
        stuck.sendall(b"GET /large.bin " + HEAD + b"\r\n")
        slow.sendall(b"GET /large.bin " + HEAD + b"Connection: close\r\n\r\n")
        received = 0
        for _ in range(30):  # for 1.5 s, so several times as long as the server's patience
            received += len(slow.recv(1 << 20))
            time.sleep(0.05)
        while part := slow.recv(1 << 20):
            received += len(part)
        assert received > 30 << 20
        assert len(read_all(stuck)) < 30 << 20


def test_a_large_answer_has_to_be_read_in_time(page: Path) -> None:
    large = "import infer.service.answers as a, infer.service.sending as s; s.SECONDS, s.LEAST_RATE = 0.3, 2**40\n"
    large += "a.encode_answer = lambda *given: bytes(30 << 20)"
    with served(page, before=large) as server:
        with server.connect() as stuck:
            stuck.sendall(b"GET /image " + HEAD + b"\r\n")
            while not server.metric("catinfer_requests_total", path="/image"):
                time.sleep(0.02)
            assert len(read_all(stuck)) < 30 << 20
        assert len(server.get("/image").body) == 30 << 20


def test_half_closed_connections(server: Served) -> None:
    for data in (b"", b"GET /image", b"GET /image?seed=4 " + HEAD + b"\r\n"):
        with server.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert statuses(read_all(connection)) in ([], [200])


def test_work_of_clients_that_leave_is_dropped(server: Served) -> None:
    images, dropped = server.metric("catinfer_images_total"), server.metric("catinfer_answers_total", source="dropped")
    connections = [server.connect() for _ in range(40)]
    for i, connection in enumerate(connections):
        connection.sendall(b"GET /walk?seeds=%d-%d&format=webp " % (100 * i, 100 * i + 15) + HEAD + b"\r\n")
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + 10
    while server.metric("catinfer_queue_requests"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("catinfer_answers_total", source="dropped") > dropped + 20
    before = -1.0
    while before < (now := server.metric("catinfer_images_total")):
        before = now
        time.sleep(0.1)
    assert now - images < 40 * 320 / 2


def test_two_hundred_clients_fill_the_queue_and_it_recovers(page: Path) -> None:
    slow = "import infer.service.answers as a, time; encode = a.encode_answer\n"
    slow += "a.encode_answer = lambda *given: time.sleep(0.03) or encode(*given)"
    with served(page, before=slow) as server:

        def ask(client: int) -> Reply:
            return server.get(f"/grid?seed={1000 * client}&n=4&format=npy")

        with ThreadPoolExecutor(200) as pool:
            replies = list(pool.map(ask, range(200)))
        answered = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status == 429]
        assert len(answered) + len(refused) == 200
        assert len(answered) >= MAX_REQUESTS
        assert refused
        for reply in refused:
            assert reply.error.startswith(f"{MAX_REQUESTS} requests or 256 MiB of images are waiting or being sent")
            assert 1 <= int(reply.headers["Retry-After"]) <= 60
        assert server.metric("catinfer_answers_total", source="refused") == len(refused)
        assert ask(0).status == ask(199).status == 200


def test_too_many_connections(page: Path) -> None:
    with served(page, before="import infer.service.server as s; s.CONNECTIONS = 10") as server:
        connections = [server.connect() for _ in range(12)]
        assert server.get("/image").status == 503
        connections += [server.connect() for _ in range(30)]
        ready, _, _ = select.select(connections, [], [], 5)
        assert len(ready) > 0, "more than twice as many are closed"
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + 10
        while server.get("/healthz").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
