"""``cluster.local`` starts and stops its own cluster and no other processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from catgan.command import UserError
from cluster import local

# Instead of `ray start --block`: a process with a child in its session and, like a job, a grandchild in another one.
NODE = """
import subprocess, sys, time
child = [sys.executable, "-c", "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); time.sleep(60)"]
subprocess.Popen(child)
time.sleep(60)
"""


def _family(process: subprocess.Popen[bytes], size: int) -> list[psutil.Process]:
    """Wait for ``size`` processes: ``process`` and its descendants."""
    deadline = time.monotonic() + 20
    while len(found := [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]) < size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    # Unlike Ray's, these children survive SIGTERM to their parent, so that stop has to send SIGKILL.
    monkeypatch.setattr(local, "STOP_TIMEOUT_S", 0.5)
    process = subprocess.Popen([sys.executable, "-c", NODE], start_new_session=True)
    family = _family(process, 3)
    try:
        yield process
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(timeout=20)


def _record(folder: Path, *nodes: local.Node) -> None:
    local.Cluster("127.0.0.1:1", "http://127.0.0.1:2", 1, nodes).save(folder)


def test_stop_ends_the_recorded_nodes_with_their_descendants_and_nothing_else(
    tmp_path: Path, node: subprocess.Popen[bytes]
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        family = _family(node, 3)
        _record(tmp_path, local.Node(node.pid, psutil.Process(node.pid).create_time()))
        assert local.stop(tmp_path) == 3
        assert not any(local._is_running(member) for member in family)
        assert bystander.poll() is None
        assert local.stop(tmp_path) == 0
    finally:
        bystander.kill()
        bystander.wait(timeout=20)


def test_stop_finds_the_processes_of_a_node_that_has_ended(tmp_path: Path, node: subprocess.Popen[bytes]) -> None:
    family = _family(node, 3)
    _record(tmp_path, local.Node(node.pid, psutil.Process(node.pid).create_time()))
    node.kill()
    node.wait(timeout=20)
    assert local.stop(tmp_path) == 2
    assert not any(local._is_running(member) for member in family)


def test_stop_spares_another_process_with_the_same_id(tmp_path: Path, node: subprocess.Popen[bytes]) -> None:
    _record(tmp_path, local.Node(node.pid, psutil.Process(node.pid).create_time() - 100))
    assert local.stop(tmp_path) == 0
    assert all(local._is_running(member) for member in _family(node, 3))


def test_a_cluster_is_saved_and_loaded(tmp_path: Path) -> None:
    assert local.Cluster.load(tmp_path) is None
    cluster = local.Cluster("127.0.0.1:6379", "http://127.0.0.1:8265", 2, (local.Node(7, 1.5), local.Node(8, 2.25)))
    cluster.save(tmp_path)
    assert local.Cluster.load(tmp_path) == cluster
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["start", "--nodes", "0"], "--nodes: '0' is given, allowed is a whole number from 1 to 100"),
        (["start", "--gpus", "1"], "unrecognized arguments: --gpus"),
        (["restart"], "invalid choice: 'restart'"),
        ([], "required"),
        (["start", "--dir", "/tmp/" + "x" * 40], "too long for Ray's sockets: give a path of at most 32"),
        (["start", "--dir", "/dev/null/c"], "Not a directory; give a folder you can write to"),
    ],
)
def test_mistakes_have_a_message(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        local.main(argv)
    assert words in str(caught.value)


@pytest.fixture
def short(request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = Path(f"/tmp/cat-{os.getpid()}")
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_port_in_use_is_refused_before_anything_starts(short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"--dashboard-port {port} is in use"):
            local.main(["start", "--dir", str(short), "--dashboard-port", port, "--port", "1023"])
    assert short.stat().st_mode & 0o777 == 0o700
    assert list(short.iterdir()) == []


def test_another_users_folder_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: short.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        local.start(short)
    for command in ("status", "stop"):  # a forged record would get this user's token, and end any process
        with pytest.raises(UserError, match="belongs to another user"):
            local.main([command, "--dir", str(short)])


def test_a_node_is_known_by_its_start_also_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        created = psutil.Process(process.pid).create_time()
        node = local.Node(process.pid, local._start_of(process.pid))
        assert [found.pid for found in local._processes(local.Node(process.pid, created))] == [process.pid], "as before"
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created + 3600)
        assert [found.pid for found in local._processes(node)] == [process.pid]
        assert local._processes(local.Node(process.pid, node.created + 1)) == []
    finally:
        process.kill()
        process.wait()


def test_status_and_stop_without_a_cluster(tmp_path: Path) -> None:
    assert local.main(["status", "--dir", str(tmp_path)]) == {"running": False, "dir": str(tmp_path)}
    assert local.main(["stop", "--dir", str(tmp_path)]) == {"stopped": 0}


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_start_once_and_stop(sandbox: Any) -> None:
    def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        assert done.returncode == 0, done.stdout
        value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return value

    started = answer(sandbox.start("--nodes", "2", "--cpus", "1"))
    assert started["nodes"] == 2
    assert started["dashboard"] == f"http://127.0.0.1:{sandbox.dashboard}"
    assert answer(sandbox.local("status")) == started
    again = sandbox.start()
    assert again.returncode == 2
    assert "a cluster is running already" in again.stdout
    listed = sandbox.run("ray", "job", "list")
    assert listed.returncode == 0, listed.stdout
    sandbox.env["RAY_AUTH_MODE"] = "disabled"
    assert sandbox.run("ray", "job", "list").returncode != 0
    sandbox.env["RAY_AUTH_MODE"] = "token"
    assert answer(sandbox.local("stop"))["stopped"] > 4
    home = str(sandbox.home)
    assert not [p for p in psutil.process_iter(["cmdline"]) if home in " ".join(p.info["cmdline"] or [])]
    assert answer(sandbox.local("status"))["running"] is False
