"""Ray is asked for nothing that a command can do without, and what it raises is one line."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from catgan.command import UserError
from tests.trainer.launch.runs import OPTIONS, content
from trainer.launch import connect, driver

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def command(shards: Path, tmp_path: Path) -> list[str]:
    return ["dcgan-cpu-32", "--data", str(shards), "--out", str(tmp_path), *OPTIONS]


UNUSABLE = {
    "http://127.0.0.1:8265": "belongs in RAY_API_SERVER_ADDRESS",
    "ray://127.0.0.1:10001": "Ray Client (ray://) cannot train",
    "127.0.0.1:1": "Connection refused",
    "localhost": "Invalid address format",
    "127.0.0.1:port": "127.0.0.1:port",
    "no.such.host.invalid:6379": "no.such.host.invalid:6379",
}


@pytest.mark.parametrize(("address", "part"), UNUSABLE.items())
def test_an_address_that_is_none(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, part: str
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        driver.main([*command, "--workers", "1"])
    message = str(caught.value)
    for expected in (f"RAY_ADDRESS={address}", part, "give HOST:PORT", "unset RAY_ADDRESS"):
        assert expected in message
    assert "\n" not in message
    assert content(tmp_path) == {}


@pytest.mark.parametrize("address", [*UNUSABLE, "auto"])
def test_what_needs_no_ray(
    command: list[str], monkeypatch: pytest.MonkeyPatch, address: str, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connect, "_connect", lambda *_: pytest.fail("Ray is asked"))
    with pytest.raises(SystemExit) as left:
        driver.main(["--help"])
    assert left.value.code == 0
    assert "--model.g-width" in capsys.readouterr().out
    assert driver.main([*command, "--workers", "0", "--dry-run"])["workers"] == 0


def test_a_plan_does_without_a_cluster_that_does_not_answer(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    plan = driver.main([*command, "--dry-run"])
    assert plan["workers"] == 1
    assert json.dumps(plan)
    assert "this is the plan on this machine: no connection to a Ray cluster" in capsys.readouterr().err
    assert content(tmp_path) == {}


def test_a_plan_is_that_of_the_cluster_if_it_answers(command: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(driver, "cluster_gpus", lambda: 4)
    assert driver.main([*command, "--dry-run"])["workers"] == 4


def test_another_program_at_the_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connect, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="another program answers there"):
            connect.connect_ray(1)


def test_a_machine_outside_the_cluster(monkeypatch: pytest.MonkeyPatch):
    from ray._private import services

    monkeypatch.setattr(services, "find_node_ids", set)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=r"this machine is not one of its nodes.*ray job submit"):
            connect.connect_ray(1)


VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.1.0
    Python: 3.9.1
This process on node 10.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def from_cause(cause: Exception) -> Exception:
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (RuntimeError(VERSIONS), "(Version mismatch: The cluster was started with: Ray: 2.1.0 Python: 3.9.1 This"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /scratch"), "(AF_UNIX path length"),
        (Exception("The last 20 lines of dashboard.log:\n" + "  line\n" * 20 + "OSError: in use"), "(OSError: in use)"),
        (AssertionError("Session name does not match"), "(Session name does not match)"),
        (from_cause(RuntimeError("Failed to connect to GCS")), "(Failed to connect to GCS)"),
        (ValueError(), "(ValueError)"),
        (SystemExit(15), "(15)"),
    ],
)
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_what_ray_raises(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    address: str | None,
    error: BaseException,
    part: str,
):
    def init(*_: object, **__: object) -> None:
        os.write(2, b"[2000-01-01 W 1 1] gcs_client.cc:210: a line of Ray's core\n")
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connect, "_check_answers", lambda *_: None)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        driver.main([*command, "--workers", "1"])
    assert part in str(caught.value)
    assert ("RAY_ADDRESS=10.0.0.1:6379" if address else "--workers 0 trains without it") in str(caught.value)
    assert capfd.readouterr().err == ""
    assert content(tmp_path) == {}


def test_a_wrong_token(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def init(*_: object, **__: object) -> None:
        os.write(2, b"Failed to get cluster ID: Unauthenticated: InvalidAuthToken: token is missing or incorrect\n")
        raise from_cause(RuntimeError("Failed to connect to GCS"))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connect, "_check_answers", lambda *_: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"\(wrong or missing token\).*RAY_AUTH_MODE=token"):
        connect.connect_ray(1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_without_an_address_a_cluster_is_started_here(monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert connect.cluster_address() is None
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *words, **_: started.append(words))
    connect._connect(1)
    assert started == [("local",)]


def test_a_cluster_that_is_too_small(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connect, "_connect", lambda *_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match="--workers 3: the Ray cluster has 2 CPUs"):
        driver.main([*command, "--workers", "3:8"])
    assert content(tmp_path) == {}
