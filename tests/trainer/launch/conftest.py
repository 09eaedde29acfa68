"""Isolation from the Ray clusters of this machine, and a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib import request

import pytest


@pytest.fixture
def environment() -> Iterator[None]:
    """The environment without variables of Ray, restored at the end."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """The bucket ``cats`` on an S3 server. Call the fixture's value with True to refuse all requests, with False to
    accept them again."""
    import boto3  # seconds that the other tests need not wait for
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    S3FileSystem.clear_instance_cache()  # an earlier test's server had another address
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (environment | {"CATGAN_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)

    def control(command: str, value: bytes) -> None:
        address = f"http://{host}:{port}/moto-api/{command}"
        with request.urlopen(request.Request(address, value, {"Content-Type": "text/plain"})) as answer:
            assert answer.status == 200

    def refuse(everything: bool) -> None:
        control("reset-auth", b"0" if everything else b"1000000")

    control("reset", b"")  # all servers of a process share their buckets
    boto3.client("s3").create_bucket(Bucket="cats")

    try:
        yield refuse
    finally:
        refuse(False)
        server.stop()
