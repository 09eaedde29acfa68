"""The temporary folder is one in which sockets can be created, and threads sleep soon, unless the user has chosen."""

from __future__ import annotations

import multiprocessing.connection
import os
import tempfile
from pathlib import Path

import pytest

from catgan.machine import SPIN_COUNT, shorten_tmpdir, spin_less


@pytest.fixture
def tmpdir_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR deeper than the path of a socket may be."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_a_tmpdir_that_is_too_long_for_sockets_is_replaced(
    tmpdir_of_a_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten_tmpdir()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(tmpdir_of_a_job)
    assert f"{tmpdir_of_a_job} is too long for sockets" in capsys.readouterr().err
    socket = Path(tempfile.mkdtemp()) / "listener-12345678"
    multiprocessing.connection.Listener(str(socket), "AF_UNIX").close()
    socket.parent.rmdir()


def test_a_short_tmpdir_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setenv("TMPDIR", "/tmp")
    shorten_tmpdir()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    assert capsys.readouterr().err == ""


def test_a_tmpdir_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/null/tmp")
    monkeypatch.setattr(tempfile, "tempdir", None)
    shorten_tmpdir()
    assert os.access(os.environ["TMPDIR"], os.W_OK)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_sleep_soon(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], count: str | None) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # restored at the end
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    spin_less()
    assert os.environ.get("GOMP_SPINCOUNT") == count
