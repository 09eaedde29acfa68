"""``catinfer serve`` in a process of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> str:
        """The message of an error, which is the only thing in the answer, on one line."""
        assert self.headers["Content-Type"] == "application/json"
        assert self.headers["Cache-Control"] == "no-store"
        assert self.body.count(b"\n") == 1
        assert self.body.endswith(b"\n")
        value = json.loads(self.body)
        assert list(value) == ["error"]
        return str(value["error"])


@dataclass
class Served:
    """A running server.

    Attributes:
        lines: what it has printed to stderr so far.
        result: its JSON object, once it has ended.
    """

    process: subprocess.Popen[str]
    port: int
    lines: list[str]
    reader: threading.Thread
    result: dict[str, Any] = field(default_factory=dict)

    def get(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        try:
            connection.request(method, path, headers=headers or {})
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection((HOST, self.port), timeout=30)

    def send(self, data: bytes) -> bytes:
        """Everything that the server answers to ``data`` until it closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def metric(self, name: str, **labels: str) -> float:
        """A value of ``/metrics``, summed over the labels that are not given."""
        text = self.get("/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def stop(self, sign: int = signal.SIGTERM) -> None:
        """End it, which must succeed, without a traceback."""
        self.process.send_signal(sign)
        assert self.process.wait(30) == 0, self.lines
        self.reader.join(30)
        assert self.lines[-1] == "stopped"
        assert not any("Traceback" in line for line in self.lines), self.lines
        assert self.process.stdout is not None
        self.result = json.loads(self.process.stdout.read())


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes or resets the connection."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


@contextmanager
def served(*arguments: str | Path, before: str = "") -> Iterator[Served]:
    """``catinfer serve ARGUMENTS`` on the CPU on a free port; ``before`` is Python that runs first."""
    program = f"{before}\nfrom infer.cli import entry; entry()"
    command = [sys.executable, "-c", program, "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stdout is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"http://\S+:(\d+)/ serves .*, Ctrl-C stops it\n", line)
        assert found, line
        lines = [line.strip()]
        errors = process.stderr
        reader = threading.Thread(target=lambda: [lines.append(line.strip()) for line in errors], daemon=True)
        reader.start()
        server = Served(process, int(found[1]), lines, reader)
        yield server
        if process.returncode is None:
            server.stop()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
