from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from catgan.command import UserError
from infer.service.server import serve

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
SECRET = b"secret"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    def get(self, path: str, method: str = "GET", host: str | None = None) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"{HOST}:{self.port}")
        connection.endheaders()
        reply = connection.getresponse()
        result = Reply(reply.status, reply.headers, reply.read())
        connection.close()
        return result


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "page"
    (folder / "sub").mkdir(parents=True)
    for name in ("index.html", "a.wasm", "a.mjs", "a.js", "a.onnx", "a.css", "a.json", "sub/inside.png"):
        (folder / name).write_bytes(name.encode())
    (folder.parent / "secret.txt").write_bytes(SECRET)
    (folder.parent / "page-beside").mkdir()
    (folder.parent / "page-beside" / "secret.txt").write_bytes(SECRET)
    (folder / ".git").mkdir()
    for name in (".env", ".git/config"):
        (folder / name).write_bytes(SECRET)
    (folder / "out.txt").symlink_to("../secret.txt")
    (folder / "out").symlink_to("..", target_is_directory=True)
    (folder / "in.png").symlink_to("sub/inside.png")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture(scope="module")
def server(page: Path) -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from infer.cli import entry; entry()", "serve", str(page), "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ serves .*, Ctrl-C stops it\n", line)
    assert found, line
    yield Server(process, int(found[1]))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out) == {"address": f"http://127.0.0.1:{found[1]}/", "folder": str(page)}
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html", "text/html; charset=utf-8"),
        ("/?seed=7", "text/html; charset=utf-8"),
        ("/a.wasm", "application/wasm"),
        ("/a.mjs", "text/javascript; charset=utf-8"),
        ("/a.js", "text/javascript; charset=utf-8"),
        ("/a.onnx", "application/octet-stream"),
        ("/a.css", "text/css; charset=utf-8"),
        ("/a.json", "application/json"),
        ("/sub/inside.png", "image/png"),
        ("/in.png", "image/png"),
    ],
)
def test_files_have_their_content_type(server: Server, path: str, kind: str) -> None:
    reply = server.get(path)
    assert reply.status == 200
    name = {"/": "index.html", "/?seed=7": "index.html", "/in.png": "sub/inside.png"}.get(path, path[1:])
    assert reply.body == name.encode()
    assert reply.headers["Content-Type"] == kind
    assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/none.html",
        "/sub/",
        "/out.txt",
        "/out/",
        "/out/secret.txt",
        "/out/page-beside/secret.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/sub/../../secret.txt",
        "//secret.txt",
        "/../page-beside/secret.txt",
        "/%00",
        "/loop",
        "/.env",
        "/.git/config",
        "/" + "x" * 5000,
    ],
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    for method in ("GET", "HEAD"):
        reply = server.get(path, method)
        assert reply.status == 404
        assert SECRET not in reply.body
        assert b"inside" not in reply.body


def test_a_folder_without_slash_redirects_to_itself(server: Server) -> None:
    assert server.get("/sub").headers["Location"] == "/sub/"
    assert server.get("//sub").headers["Location"] == "/sub/"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example:80", ":", "[::1]:80"])
def test_other_names_for_this_machine_are_refused(server: Server, host: str) -> None:
    reply = server.get("/a.json", host=host)
    assert (reply.status, b"a.json" in reply.body) == (403, False)
    assert server.get("/a.json", host="localhost:1234").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(server: Server, method: str) -> None:
    assert server.get("/a.json", method).status == 405


def test_it_listens_on_loopback_only(server: Server) -> None:
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc")
    listening = [line.split()[1] for line in table.read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [a for a in listening if a.endswith(f":{server.port:04X}")] == [f"0100007F:{server.port:04X}"]


def test_mistakes_have_a_message(page: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such file or directory; give a gen.onnx, the folder of a run, or the page"
    ):
        serve(str(tmp_path / "none"), HOST, 0)
    with pytest.raises(UserError, match=r"holds no index.html and no best/gen.onnx; `catexport --web DIR` makes"):
        serve(str(tmp_path), HOST, 0)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; choose another, or 0"):
            serve(str(page), HOST, port)
