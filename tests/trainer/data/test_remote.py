"""Data sets in buckets and on web servers are read like local ones, in spite of failures, and unsafe URLs refused."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from catgan.command import UserError
from catgan.dataset import Manifest
from catgan.location import filesystem
from trainer.config import LoaderConfig
from trainer.data.build.shards import write_shards
from trainer.data.build.verify import verify
from trainer.data.fetch import shard_bytes
from trainer.data.stream import StreamPosition, TrainStream, eval_images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SIZE, NUM = 32, 40


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    images = (
        (np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), {"i": i}) for i in range(NUM)
    )
    return write_shards(tmp_path_factory.mktemp("web") / "cats", images, size=SIZE, val_fraction=0.2)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catgan.location._FIRST_PAUSE", 0.001)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback. ``failures`` lists for each path how its next requests fail."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.failures: dict[str, list[str]] = {}
        self.requests = Counter[str]()
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        failures = self.server.failures.get(self.path)
        match failures.pop(0) if failures else "":
            case "503":
                self.send_error(503)
            case "hang up":
                self.connection.shutdown(socket.SHUT_RDWR)
            case "half":
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
            case "garbage":
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(bytes(len(data)))
            case _:
                super().do_GET()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(local: Manifest) -> Iterator[Server]:
    with served(Path(local.root).parent) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(local: Manifest) -> Iterator[str]:
    """The data set in a bucket of a local S3 server, whose address and credentials are in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()  # an earlier test's has another address
        place, _ = filesystem("s3://shards")
        place.mkdir("shards")
        for path in Path(local.root).iterdir():
            place.put_file(str(path), f"shards/sets/{path.name}")
        yield "s3://shards/sets"
    server.stop()


def batches(manifest: Manifest, readers: int = 0, count: int = 12) -> torch.Tensor:
    start = StreamPosition(seed=0, rank=0, nimg=0, batch=4, batches_per_segment=6, images_per_segment=24)
    stream = TrainStream(manifest, start, LoaderConfig(workers=readers, shuffle_buffer=10, memory_mib=0))
    return torch.cat(list(itertools.islice(stream, count)))


def pixels(manifest: Manifest, split: str = "train") -> torch.Tensor:
    return torch.cat(list(eval_images(manifest, split)))


@pytest.mark.parametrize("readers", [0, 2])
def test_bucket_is_read_like_a_folder(local: Manifest, bucket: str, readers: int) -> None:
    remote = verify(bucket)
    assert remote.digest == local.digest
    assert torch.equal(pixels(remote), pixels(local))
    assert torch.equal(batches(remote, readers), batches(local, readers))


@pytest.mark.parametrize("readers", [0, 2])
def test_web_server_is_read_like_a_folder(local: Manifest, web: Server, readers: int) -> None:
    remote = verify(f"{web.url}/cats/")
    assert torch.equal(pixels(remote), pixels(local))
    assert torch.equal(batches(remote, readers), batches(local, readers))


def test_network_failures_are_retried(local: Manifest, web: Server, capfd: pytest.CaptureFixture[str]) -> None:
    first, second, third, *_ = (f"/cats/{shard.name}" for shard in local.splits["train"].shards)
    web.failures = {
        "/cats/manifest.json": ["503", "hang up"],
        first: ["half", "503", "hang up", "half"],
        second: ["garbage"],
        third: ["503"],
    }
    remote = replace(Manifest.load(f"{web.url}/cats"), max_broken=0.5)
    assert torch.equal(pixels(remote), pixels(replace(local))) is False  # garbage of the right length is not retried
    assert (web.requests[first], web.requests[second], web.requests[third]) == (5, 1, 2)
    assert torch.equal(pixels(remote), pixels(local))
    assert "trying again in" in capfd.readouterr().err


def test_shard_that_cannot_be_read_is_reported(local: Manifest, web: Server) -> None:
    gone = local.splits["train"].shards[1].name
    web.failures[f"/cats/{gone}"] = ["503"] * 100
    with pytest.raises(UserError, match=rf"unusable.*{gone}: 1 \(503.*\)"):
        pixels(Manifest.load(f"{web.url}/cats"))
    assert web.requests[f"/cats/{gone}"] == 8


def test_missing_files_are_not_retried(web: Server) -> None:
    with pytest.raises(UserError, match="holds no manifest"):
        Manifest.load(f"{web.url}/dogs")
    assert web.requests["/dogs/manifest.json"] == 1


def test_missing_buckets_and_credentials_are_reported(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("s3://shards/nothing", "s3://dogs/sets"):
        with pytest.raises(UserError, match="holds no manifest"):
            Manifest.load(nothing)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="Unable to locate credentials"):
        Manifest.load(bucket)
    S3FileSystem.clear_instance_cache()


def test_intact_shards_are_downloaded_once_and_cached(local: Manifest, web: Server, tmp_path: Path) -> None:
    remote = replace(Manifest.load(f"{web.url}/cats"), cache=str(tmp_path / "cache"))
    shard = remote.splits["train"].shards[0]
    path = f"/cats/{shard.name}"
    web.failures[path] = ["garbage"]
    with pytest.raises(OSError, match="sha256"):
        shard_bytes(remote, shard)
    assert not (tmp_path / "cache").exists()
    for _ in range(3):
        assert shard_bytes(remote, shard) == Path(local.root, shard.name).read_bytes()
    assert web.requests[path] == 2
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{shard.sha256}.tar"]


def test_damaged_file_in_the_cache_is_downloaded_again(local: Manifest, web: Server, tmp_path: Path) -> None:
    remote = replace(Manifest.load(f"{web.url}/cats"), cache=str(tmp_path))
    shard = remote.splits["train"].shards[0]
    for content in (b"", bytes(shard.bytes)):
        (tmp_path / f"{shard.sha256}.tar").write_bytes(content)
        assert shard_bytes(remote, shard) == Path(local.root, shard.name).read_bytes()
        assert (tmp_path / f"{shard.sha256}.tar").read_bytes() == Path(local.root, shard.name).read_bytes()


def test_ctrl_c_does_not_wait_for_a_silent_server(local: Manifest, tmp_path: Path) -> None:
    """The server accepts connections and never answers."""
    shutil.copytree(local.root, tmp_path / "cats")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = (
            "import dataclasses\nfrom catgan.dataset import Manifest\n"
            "from trainer.data.stream import eval_images\n"
            f"m = dataclasses.replace(Manifest.load({str(tmp_path / 'cats')!r}), root={url!r})\n"
            "print('reading', flush=True); list(eval_images(m, 'train'))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Else it would ignore Ctrl-C where the tests run in the background of a shell.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0  # the server would be waited for during minutes


def test_cache_that_cannot_be_written_does_not_stop_reading(local: Manifest, web: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remote = replace(Manifest.load(f"{web.url}/cats"), cache=str(tmp_path / "file"))
    shard = remote.splits["train"].shards[0]
    assert shard_bytes(remote, shard) == Path(local.root, shard.name).read_bytes()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("pipe:touch {there}", "begins with s3://"),
        ("file:///etc/passwd", "begins with s3://"),
        ("ssh://host/x", "begins with s3://"),
        ("simplecache::s3://cats/x", "begins with s3://"),
        ("s3://key:secret@cats/x", "credentials are read from the environment"),
        ("http://127.0.0.1:1/cats?token=x", "without \\? and #"),
    ],
)
def test_unsafe_urls_are_refused(url: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Manifest.load(url.format(there=tmp_path / "there"))
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.soak
@pytest.mark.slow
def test_training_and_measuring_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    def command(*argv: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    tiny = "--batch 8 --model.g-width 8 --model.d-width 8 --kimg 0.064 --eval.extractor efflite0 --eval.num 16"
    trained = command(
        "trainer/run.py",
        *("--data", bucket, "--out", str(tmp_path / "runs"), "--workers", "0", *tiny.split()),
        *("--loader.cache", str(tmp_path / "cache")),
    )
    assert Path(trained["onnx"]).is_file()
    assert list((tmp_path / "cache").glob("*.tar"))
    measured = command(
        "-m", "trainer.metrics.catfid.cli", bucket, bucket, "--metrics", "kid", "--extractor", "efflite0"
    )
    assert measured["n_real"] == NUM
