"""``catinfer --list`` with a model registry: what it asks and shows, and servers that fail, deceive or hang."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from catgan.command import UserError, run_command
from infer import registry
from infer.builtin import builtin_models
from infer.cli import NAME, main

SECRET = "correct-horse"
TAGS = {"recipe": "tiny", "kimg": "2.5", "metric": "fd2k_x", "metric_value": "12.5", "size": "8", "onnx_sha256": "ab"}


class Server(http.server.ThreadingHTTPServer):
    """Answers by ``reply``, which gets the path and the query, and returns a JSON value, or writes to the handler and
    returns None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.reply: Callable[[str, dict[str, str], Handler], Any] = lambda *_: {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.authorizations: set[str | None] = set()
        self.stopped = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path.removeprefix("/api/2.0/mlflow/"), dict(parse_qsl(parts.query))
        self.server.asked.append((path, query))
        self.server.authorizations.add(self.headers["Authorization"])
        value = self.server.reply(path, query, self)
        if value is not None:
            self.send(200, json.dumps(value).encode())

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


def version(name: str, number: str, **tags: str) -> dict[str, Any]:
    tags = TAGS | tags
    return {"name": name, "version": number, "tags": [{"key": key, "value": value} for key, value in tags.items()]}


def model(name: str, *latest: dict[str, Any], **aliases: str) -> dict[str, Any]:
    """As MLflow answers: empty fields are left out."""
    found = [{"alias": alias, "version": number} for alias, number in aliases.items()]
    fields = {"name": name, "latest_versions": list(latest), "aliases": found}
    return {key: value for key, value in fields.items() if value}


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The generators of ``catinfer --list`` besides those in the package, which must be there; the lines on stderr."""
    run_command(NAME, main, ["--list", *arguments])
    output = capsys.readouterr()
    models = json.loads(output.out)["models"]
    count = len(builtin_models())
    assert [one["onnx"] for one in models[:count]] == list(builtin_models())
    assert SECRET not in output.out + output.err
    return models[count:], output.err.splitlines()


def test_without_a_registry_no_socket_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        opened.append(arguments)
        raise OSError("refused")

    monkeypatch.setattr(socket, "socket", refuse)
    assert listed(capsys)[0] == []
    for uri in ("sqlite:///mlflow.db", "databricks", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert listed(capsys)[0] == []
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert listed(capsys)[0] == []
    assert opened == []
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert_left_out(capsys, "refused")
    assert len(opened) == 1


def test_versions_with_an_alias_and_the_latest_ones(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pages = {
        "": [model("a b", version("a b", "3"), version("a b", "12"), champion="2", prod="2"), model("empty")],
        "next": [model("foreign", {"version": "1"}, best="1"), model("same", version("same", "1"), champion="1")],
    }

    def reply(path: str, query: dict[str, str], _: Handler) -> Any:
        if path == "model-versions/get":
            return {"model_version": version(query["name"], query["version"], metric_value="7")}
        return {"registered_models": pages[query.get("page_token", "")]} | (
            {} if "page_token" in query else {"next_page_token": "next"}
        )

    server.reply = reply
    models, lines = listed(capsys, f"{server.address}/")
    assert [(one["model"], one["metric_value"]) for one in models] == [
        ("models:/a b@champion", 7),
        ("models:/a b/12", 12.5),
        ("models:/same@champion", 12.5),
    ]
    expected = {"onnx": None, "size": 8, "recipe": "tiny", "kimg": 2.5, "metric": "fd2k_x", "bytes": None}
    assert expected.items() <= models[0].items()
    query = "name=a+b&version=2&path=model.onnx"
    address = f"{server.address}/model-versions/get-artifact"
    assert models[0]["download"] == f"{address}?{query}"
    assert f"curl -fG -d '{query}' -o a-b-2.onnx {address} && catinfer --onnx a-b-2.onnx" in lines[-1]
    assert [path for path, _ in server.asked] == [
        "registered-models/search",
        "model-versions/get",
        "registered-models/search",
    ]


def test_the_environment_names_the_registry(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda *_: {"registered_models": [model("cats", version("cats", "1"))]}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    assert [one["model"] for one in listed(capsys, str(tmp_path))[0]] == ["models:/cats/1"]
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server.address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert [one["model"] for one in listed(capsys)[0]] == ["models:/cats/1"]
    server.asked.clear()
    main(["--n", "1", "--device", "cpu"])
    assert server.asked == [], "only --list asks"


def test_credentials_are_in_the_header_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    def sent(address: str = server.address) -> str | None:
        server.authorizations.clear()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        _, lines = listed(capsys)
        commands.append(lines[-1])
        (authorization,) = server.authorizations
        return authorization

    commands: list[str] = []
    server.reply = lambda *_: {"registered_models": [model("cats", version("cats", "1"))]}
    assert sent() is None
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    assert sent() == f"Bearer {SECRET}"
    assert '--oauth2-bearer "$MLFLOW_TRACKING_TOKEN"' in commands[-1]
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "cät")
    assert sent() == f"Bearer {SECRET}", "a name without a password is none, as for MLflow"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert sent() == basic(f"cät:{SECRET}")
    assert '-u "$MLFLOW_TRACKING_USERNAME:$MLFLOW_TRACKING_PASSWORD"' in commands[-1]
    assert sent(f"http://me:{SECRET}%40@127.0.0.1:{server.server_port}/?token={SECRET}") == basic(f"me:{SECRET}@")
    with pytest.raises(UserError, match="without user and password") as error:
        main(["--list", f"http://me:{SECRET}@127.0.0.1"])
    assert SECRET not in str(error.value)


def test_credentials_of_the_environment_are_for_the_servers_that_it_names(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda *_: {"registered_models": [model("cats", version("cats", "1"))]}
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    listed(capsys, server.address)
    assert server.authorizations == {None}
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"{server.address}/prefix")
    listed(capsys, server.address)
    assert server.authorizations == {None, f"Bearer {SECRET}"}


def test_a_broken_record_and_versions_of_other_programs_hide_no_generator(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"name": "cats", "version": "2"}
    broken = {"name": 7}
    server.reply = lambda path, *_: (
        {"model_version": version("cats", "1")}
        if "model-versions" in path
        else {"registered_models": [broken, model("cats", other, champion="1")]}
    )
    models, _ = listed(capsys, server.address)
    assert [one["model"] for one in models] == ["models:/cats@champion"]


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@127.0.0.1:1",
        f"http://me:{SECRET}/@127.0.0.1:1",  # should have been encoded
        f"http://me:{SECRET}?#@127.0.0.1:1",
        "http://127.0.0.1:port",
        "http://[::1",
        "http://",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:1\r\nX: y",
        "http://127.0.0.1:1/ü",
    ],
)
def test_addresses_without_a_server(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert_left_out(capsys, "cannot be read")


def test_a_token_with_line_breaks(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{SECRET}\r\nX: y")
    assert_left_out(capsys, "MLFLOW_TRACKING_TOKEN has characters")
    assert server.asked == []


def assert_left_out(capsys: pytest.CaptureFixture[str], reason: str, *arguments: str) -> None:
    """The list has nothing of the registry, and one line says why."""
    models, lines = listed(capsys, *arguments)
    assert models == []
    (line,) = [line for line in lines if "left out" in line]
    assert reason in line
    assert len(lines) == 2 + len(builtin_models())


@pytest.mark.parametrize(
    "value",
    [
        [],
        "text",
        {"registered_models": {"name": "a"}},
        {"registered_models": [[]]},
        {"registered_models": [{}]},
        {"registered_models": [{"name": ["a"]}]},
        {"registered_models": [{"name": "x" * 257}]},
        {"registered_models": [model("a", {"version": 1})]},
        {"registered_models": [model("a", {"version": "1; rm -rf x"})]},
        {"registered_models": [model("a", {"version": "1", "tags": {"onnx_sha256": "a"}})]},
        {"registered_models": [model("a", {"version": "1", "tags": [{"key": "onnx_sha256", "value": 1}]})]},
        {"registered_models": [model("a", version("a", "1")) | {"aliases": ["champion"]}]},
        {"registered_models": [model("a", version("a", "1")) | {"aliases": [{"version": "1"}]}]},
        {"registered_models": [model("a", version("a", "1"), champion="2")]},  # asked for it, it answers the same
        {"registered_models": [], "next_page_token": 7},
    ],
)
def test_answers_of_other_types(value: Any, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda *_: value
    assert_left_out(capsys, "its answer is not one of MLflow's", server.address)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b'{"registered_models": [', b"\xff\xfe\xfd", b"[" * 100_000, b"9" * 5000]
)
def test_answers_that_are_not_json(data: bytes, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda _, __, handler: handler.send(200, data)
    assert_left_out(capsys, "its answer is not one of MLflow's", server.address)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "HTTP 401: set MLFLOW_TRACKING_URI to this address"), (404, "HTTP 404"), (500, "HTTP 500")],
)
def test_refusals(status: int, reason: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda _, __, handler: handler.send(status, b"\x1b[2J" + SECRET.encode())
    assert_left_out(capsys, reason, server.address)


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_no_redirect_is_followed(scheme: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{scheme}://{server.address.partition('://')[2]}/there"
    server.reply = lambda _, __, handler: handler.send(302, b"", Location=target)
    assert_left_out(capsys, "HTTP 302: it redirects", server.address)
    assert [path for path, _ in server.asked] == ["registered-models/search"]


def test_a_huge_answer_is_not_read_to_its_end(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    sent = 0

    def reply(_: str, __: dict[str, str], handler: Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            while sent < 2**30:
                sent += handler.wfile.write(b" " * 2**20)
        except OSError:
            pass

    server.reply = reply
    assert_left_out(capsys, "more than 4,194,304 bytes", server.address)
    assert sent < 2**28


@pytest.mark.parametrize("drip", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"])
def test_a_server_that_hangs_or_sends_little_by_little(
    drip: bytes, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(_: str, __: dict[str, str], handler: Handler) -> None:
        handler.wfile.write(drip)
        while drip and not server.stopped.wait(0.05):  # each byte comes before a socket's time limit
            handler.wfile.write(b"x")
        server.stopped.wait()

    server.reply = reply
    monkeypatch.setattr(registry, "SECONDS", 0.3)
    began = time.monotonic()
    assert_left_out(capsys, "no complete answer within 0.3 s", server.address)
    assert time.monotonic() - began < 3


def test_names_and_tags_cannot_deceive_a_terminal_or_a_shell(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "-o /etc/x\x1b[2J\n'; touch taken #\u202e"
    tags = {"recipe": "\x1b]0;taken\x07", "metric": "x" * 9000, "metric_value": "nan", "kimg": "inf", "size": "1e999"}
    server.reply = lambda *_: {"registered_models": [model(name, version(name, "1", **tags), **{"a\x1b[1m": "1"})]}
    (one,), lines = listed(capsys, server.address)
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(lines))
    assert one["model"] == r"models:/-o /etc/x\x1b[2J\n'; touch taken #\u202e@a\x1b[1m"
    assert len(one["metric"]) == 200
    assert (one["metric_value"], one["kimg"], one["size"]) == (None, None, None)
    assert "-o o-etc-x-2J-touch-taken-1.onnx " in lines[-1]
    assert all(len(line) < 1000 for line in lines)


def test_endless_registries_are_bounded(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    many = [model(f"m{i}", version(f"m{i}", "1")) for i in range(registry.MAX_MODELS)]
    server.reply = lambda *_: {"registered_models": many, "next_page_token": "again"}
    models, lines = listed(capsys, server.address)
    assert len(models) == registry.MAX_MODELS
    assert sum("left out" in line for line in lines) == 1
    server.reply = lambda *_: {"next_page_token": "again"}
    server.asked.clear()
    assert listed(capsys, server.address)[0] == []
    assert len(server.asked) == registry._PAGES


def test_a_model_of_the_registry_as_the_generator() -> None:
    with pytest.raises(UserError, match=r"models:/cats@champion is in MLflow: `catinfer --list` shows"):
        main(["--onnx", "models:/cats@champion"])
