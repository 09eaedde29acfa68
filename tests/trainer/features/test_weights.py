"""Finding Inception's weights in the promised order, and refusing files that are none."""

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
    """Where torch hub keeps the file; nothing is there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / their_inception.FID_WEIGHTS_URL.rpartition("/")[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves CONTENT as the weights on this machine."""

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
        monkeypatch.setattr(their_inception, "FID_WEIGHTS_URL", url)
        monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setenv("CATGAN_OFFLINE", "0")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        httpd.shutdown()


def test_a_named_file_comes_first(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.parent.mkdir(parents=True)
    hub.touch()
    assert find_inception() == hub
    by_environment, by_option = tmp_path / "environment.pth", tmp_path / "option.pth"
    by_environment.touch()
    by_option.touch()
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(by_environment))
    assert find_inception() == by_environment
    assert find_inception(by_option) == by_option


def test_a_named_file_that_is_missing_is_no_reason_to_take_another(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.parent.mkdir(parents=True)
    hub.touch()
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="CATGAN_INCEPTION_WEIGHTS"):
        find_inception()


def test_offline_asks_no_server(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CATGAN_OFFLINE", "1")
    with pytest.raises(Unavailable, match="CATGAN_OFFLINE"):
        find_inception()


def test_a_download_is_kept(hub: Path, server: str):
    assert find_inception() == hub
    assert hub.read_bytes() == CONTENT
    assert list(hub.parent.iterdir()) == [hub]


def test_a_damaged_download_leaves_nothing(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(Unavailable, match="damaged"):
        find_inception()
    assert list(hub.parent.iterdir()) == []


def test_no_server_is_a_reason(hub: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(their_inception, "FID_WEIGHTS_URL", "http://127.0.0.1:1/weights.pth")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
        find_inception()


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_weights_arrive(tmp_path: Path):
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
        (b"", "not a file of weights"),
        (b"plain text\n" * 100, "not a file of weights"),
        (b"PK\x03\x04" + bytes(100), "not a file of weights"),
        (Exploit(), "not a file of weights"),
        ([1, 2], "something else"),
        ({"epoch": 3}, "something else"),
        ({}, "lacks 0.weight"),
        (Small().state_dict() | {"extra": torch.zeros(1)}, "unknown extra"),
        (Small().state_dict() | {"0.weight": torch.zeros(5)}, "other shapes"),
    ],
)
def test_other_files_are_refused(content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_weights(Small(), path)
    assert not Path("exploited").exists()


def test_truncated_weights_are_refused(tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save(Small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a file of weights"):
        load_weights(Small(), path)
