"""Weights files: the order in which Inception's are searched for, and the files that are refused."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytorch_fid import inception as their_inception
from torch import nn

from catgan.command import UserError
from trainer.features import weights
from trainer.features.weights import Unavailable, find_inception, load_weights

CONTENT = b"weights" * 100_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the file in torch hub's cache, where nothing exists yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / their_inception.FID_WEIGHTS_URL.rpartition("/")[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves CONTENT as the weights; the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/{their_inception.FID_WEIGHTS_URL.rpartition('/')[2]}"
        monkeypatch.setattr(weights, "INCEPTION_URL", url)
        monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setenv("CATGAN_OFFLINE", "0")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        httpd.shutdown()


def test_a_named_file_is_used_before_the_cached_one(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.parent.mkdir(parents=True)
    hub.touch()
    assert find_inception() == hub
    by_environment, by_option = tmp_path / "environment.pth", tmp_path / "option.pth"
    by_environment.touch()
    by_option.touch()
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(by_environment))
    assert find_inception() == by_environment
    assert find_inception(by_option) == by_option


def test_a_missing_named_file_is_an_error(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.parent.mkdir(parents=True)
    hub.touch()
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="CATGAN_INCEPTION_WEIGHTS"):
        find_inception()


def test_nothing_is_downloaded_offline(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CATGAN_OFFLINE", "1")
    with pytest.raises(Unavailable, match="CATGAN_OFFLINE"):
        find_inception()


def test_a_download_is_cached(hub: Path, server: str):
    assert find_inception() == hub
    assert hub.read_bytes() == CONTENT
    assert list(hub.parent.iterdir()) == [hub]


def test_a_damaged_download_is_not_cached(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(Unavailable, match="damaged"):
        find_inception()
    assert list(hub.parent.iterdir()) == []


def test_an_unreachable_server_is_the_reason(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "INCEPTION_URL", "http://127.0.0.1:1/weights.pth")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
        find_inception()


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_weights_are_loaded(tmp_path: Path):
    source, target = Small(), Small()
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target[0].weight, source[0].weight)


class Exploit:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploited"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a weights file"),
        (b"plain text\n" * 100, "not a weights file"),
        (b"PK\x03\x04" + bytes(100), "not a weights file"),
        (Exploit(), "not a weights file"),
        ([1, 2], "does not hold the weights of a network"),
        ({"epoch": 3}, "does not hold the weights of a network"),
        ({}, "0.weight is missing"),
        (Small().state_dict() | {"extra": torch.zeros(1)}, "extra is unknown"),
        (Small().state_dict() | {"0.weight": torch.zeros(5)}, "other shapes"),
    ],
)
def test_other_files_are_rejected(content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_weights(Small(), path)
    assert not Path("exploited").exists()


def test_truncated_weights_are_rejected(tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save(Small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a weights file"):
        load_weights(Small(), path)


def test_the_address_is_that_of_pytorch_fid():
    assert weights.INCEPTION_URL == their_inception.FID_WEIGHTS_URL
