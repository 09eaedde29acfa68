"""Paths and URLs: which is which, what is refused, and retries."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from catgan.command import UserError
from catgan.location import TRIES, filesystem, is_url, join, local_path, read, resolved_path, retry


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catgan.location._FIRST_PAUSE", 0.001)


@pytest.mark.parametrize(
    "url", ["s3://bucket/cats", "https://example.org/cats.zip", "simplecache::s3://a", "pipe:cat x"]
)
def test_urls_are_not_local_paths(url: str) -> None:
    assert is_url(url)
    with pytest.raises(UserError, match="is a URL"):
        local_path(url)


@pytest.mark.parametrize("path", ["cats", "/data/cats", "a:b", "C:cats", "C:\\cats", "./s3:/x"])
def test_paths_are_not_urls(path: str) -> None:
    assert not is_url(path)
    assert not is_url(Path(path))
    assert local_path(path) == Path(path)


@pytest.mark.parametrize("path", ["-", "-/runs"])
def test_a_dash_is_not_a_path(path: str) -> None:
    with pytest.raises(UserError, match=f"{path}: - stands for standard input or output"):
        local_path(path)
    assert local_path("-x") == Path("-x")


def test_join_of_paths_and_of_urls() -> None:
    assert join("s3://a/b/", "c") == "s3://a/b/c"
    assert join("/a/b", "c") == "/a/b/c"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:touch x", "begins with s3://"),
        ("file:///etc/passwd", "begins with s3://"),
        ("simplecache::s3://cats/x", "begins with s3://"),
        ("s3://cats::file:///etc", "cannot contain ::"),
        ("http://key:secret@[::1]:8000/cats", "credentials are read from the environment"),
        ("http://[::1]:8000/cats", "IPv6 address give its name"),
        ("http://[half", "is not a URL"),
        ("s3://key:secret@cats/x", "credentials are read from the environment"),
    ],
)
def test_urls_that_run_chain_or_contain_secrets_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        filesystem(url)
    assert "secret" not in str(caught.value)


def test_read_checks_the_length(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12")
    assert read(str(tmp_path / "x")) == read(str(tmp_path / "x"), 2) == b"12"
    with pytest.raises(OSError, match="2 bytes instead of 3"):
        read(str(tmp_path / "x"), 3)


def test_retry_returns_the_first_success(capfd: pytest.CaptureFixture[str]) -> None:
    calls = itertools.count(1)

    def fail_twice() -> int:
        if (call := next(calls)) < 3:
            raise TimeoutError(f"call {call}")
        return call

    assert retry(fail_twice, "s3://bucket/x") == 3
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == ["s3://bucket/x: call 1", "s3://bucket/x: call 2"]


def test_retry_gives_up_with_the_last_error(capfd: pytest.CaptureFixture[str]) -> None:
    calls = itertools.count(1)

    def fail() -> None:
        raise TimeoutError(f"call {next(calls)}")

    with pytest.raises(TimeoutError, match=f"call {TRIES}"):
        retry(fail, "x")
    assert len(capfd.readouterr().err.splitlines()) == TRIES - 1


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("azure.core.exceptions", "AzureError"),
    ],
)
def test_errors_of_google_and_azure_are_failures(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """The packages are not installed: their exceptions are no OSError."""
    error = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: error}))
    answers = iter([error("503"), "content"])

    def fail_once() -> str:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    assert retry(fail_once, "gs://bucket/x") == "content"

    def fail() -> None:
        raise error("503")

    with pytest.raises(OSError, match="503"):
        retry(fail, "gs://bucket/x", tries=1)


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError])
def test_permanent_errors_are_not_retried(error: type[OSError]) -> None:
    calls = itertools.count(1)

    def fail() -> None:
        next(calls)
        raise error

    with pytest.raises(error):
        retry(fail, "x")
    assert next(calls) == 2


def test_dots_in_paths_lead_where_the_system_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    assert local_path(tmp_path / "link" / ".." / "x") == tmp_path / "real" / "x"
    assert local_path(f"{tmp_path}/nope/../x") == tmp_path / "x"
    assert local_path(f"{tmp_path}/nope/../x/../y/z") == tmp_path / "y" / "z"
    assert local_path(tmp_path / "link" / "x") == tmp_path / "link" / "x", "links stay, as other machines see them"
    assert resolved_path(tmp_path / "link" / "x") == tmp_path / "real" / "deep" / "x"
    monkeypatch.chdir(tmp_path / "real")
    assert local_path("../x") == tmp_path / "x"
    assert local_path("a/b") == Path("a/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x"
    assert local_path("~no such user/x") == Path("~no such user/x")


def test_link_to_itself_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert resolved_path(tmp_path / "loop") == tmp_path / "loop"
