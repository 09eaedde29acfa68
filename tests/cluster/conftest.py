"""A sandbox for a cluster and its jobs, removed at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster import local
from tests.processes import training_workers


@dataclass(frozen=True)
class Sandbox:
    """A home folder, environment and ports for a cluster and its jobs. The path is short enough for Ray's sockets."""

    home: Path
    env: dict[str, str]
    port: int
    dashboard: int

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a program of this Python's environment, with stderr in stdout."""
        program = Path(sys.executable).with_name(command[0])
        return subprocess.run(
            [str(program), *command[1:]],
            cwd=cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def local(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``python -m cluster.local ARGUMENTS`` on the sandbox's cluster."""
        return self.run("python", "-m", "cluster.local", *arguments, "--dir", str(self.home / "c"))

    def workers(self) -> list[psutil.Process]:
        """The training workers on the cluster's nodes."""
        found = local.Cluster.load(self.home / "c")
        assert found is not None
        processes = (process for node in found.nodes for process in local._processes(node))
        return training_workers(processes)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.local("start", "--port", str(self.port), "--dashboard-port", str(self.dashboard), *arguments)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    home = Path(tempfile.mkdtemp(prefix="cat", dir="/tmp"))
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        port, dashboard = a.getsockname()[1], b.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CATGAN_", "MLFLOW_", "RAY_", "XDG_"))}
    # Nothing is downloaded, and nothing is written to the user's own home.
    env |= {"HOME": str(home), "CATGAN_OFFLINE": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_COLOR_PREFIX": "0", "COLUMNS": "120"}
    box = Sandbox(home, env, port, dashboard)
    try:
        yield box
    finally:
        stopped = box.local("stop")
        shutil.rmtree(home, ignore_errors=True)
        assert stopped.returncode == 0, stopped.stdout
