"""Atomic writes leave the old file or the new one, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from catgan.command import UserError
from catgan.files import atomic_open, atomic_path, atomic_write, cache_dir, is_at, remove_partials

ROOT = Path(__file__).parents[2]


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "own" / "cache"))
    assert cache_dir() == tmp_path / "own" / "cache"
    assert cache_dir().is_dir()
    monkeypatch.delenv("CATGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "catgan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "catgan"


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot make the cache folder .* set CATGAN_CACHE to another"):
        cache_dir()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file with the content "old", alone in its folder."""
    path = tmp_path / "file.bin"
    path.write_text("old")
    return path


@pytest.mark.parametrize("durable", [True, False])
def test_atomic_path_replaces_the_file_at_the_end_of_the_block(target: Path, durable: bool) -> None:
    with atomic_path(target, durable) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_makes_a_missing_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new.bin") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "new.bin").exists()
    assert (tmp_path / "new.bin").read_text() == "new"


def test_atomic_path_syncs_before_it_replaces(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(target.read_text()))
    for durable in (True, False):
        with atomic_path(target, durable) as temporary:
            temporary.write_text("new")
    assert synced == ["old"]


def test_of_two_writers_at_once_the_last_one_wins(target: Path) -> None:
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def _write_path(temporary: Path) -> None:
    temporary.write_text("half")


def _write_file(file: Any) -> None:
    file.write(b"half")
    file.flush()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize(("open_", "write"), [(atomic_path, _write_path), (atomic_open, _write_file)])
def test_a_block_that_raises_leaves_the_old_file_and_no_partial(
    target: Path,
    open_: Callable[[Path], AbstractContextManager[Any]],
    write: Callable[[Any], None],
    error: type[BaseException],
) -> None:
    with pytest.raises(error), open_(target) as opened:  # noqa: PT012  the block is what is tested
        write(opened)
        raise error
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_block_that_writes_nothing_is_an_error(target: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "old"


def test_atomic_write_replaces_the_content(target: Path) -> None:
    atomic_write(target, b"new")
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_write_on_a_full_disk_leaves_the_old_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(self: Path, data: bytes) -> int:
        self.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, b"new")
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_open_gives_a_file_to_write_and_read(target: Path) -> None:
    with atomic_open(target) as file:
        file.write(b"new")
        file.seek(0)
        assert file.read() == b"new"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_open_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing/file\.bin: cannot be written \(No such file or directory\)"):
        atomic_open(tmp_path / "missing" / "file.bin").__enter__()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_while_writing_leaves_the_old_file_and_a_partial_to_remove(target: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from catgan.files import atomic_open\n"
        "with atomic_open(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, target], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.communicate(timeout=60)
    assert target.read_text() == "old"
    (partial,) = set(target.parent.iterdir()) - {target}
    assert partial.read_bytes() == b"half"
    assert partial.name.startswith(".")
    remove_partials(target.parent, lambda name: name == "other.bin")
    assert partial.exists()
    remove_partials(target.parent, lambda name: name == target.name)
    assert list(target.parent.iterdir()) == [target]


def test_remove_partials_keeps_all_other_files(tmp_path: Path) -> None:
    names = {"file.bin", ".hidden", "x.partial.file.bin", ".partial"}
    for name in names:
        (tmp_path / name).touch()
    remove_partials(tmp_path, lambda name: True)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_is_at_tells_whether_an_open_file_was_replaced(target: Path) -> None:
    with target.open() as file:
        assert is_at(target, file.fileno())
        atomic_write(target, b"new")
        assert not is_at(target, file.fileno())
        target.unlink()
        assert not is_at(target, file.fileno())
