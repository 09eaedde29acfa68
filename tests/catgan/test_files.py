"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from catgan.files import atomic_path, cache_dir


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "own" / "cache"))
    assert cache_dir() == tmp_path / "own" / "cache"
    assert cache_dir().is_dir()
    monkeypatch.delenv("CATGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "catgan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "catgan"


def test_a_file_appears_when_it_is_done(tmp_path: Path):
    target = tmp_path / "file.bin"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == target.suffix
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path):
    target = tmp_path / "file.bin"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
