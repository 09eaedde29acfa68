from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from catgan.command import UserError
from trainer.data.build.folder import new_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(out: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        meanwhile()
        assert names(folder) == {"a", ".lock"}


def test_folder_has_its_final_name_only_when_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "set") as folder:
        assert folder.parent == tmp_path
        assert not (tmp_path / "set").exists()
        (folder / "a").write_text("a")
    assert names(tmp_path) == {"set"}
    assert names(tmp_path / "set") == {"a"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        fill(tmp_path / "set", fail)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), sqlite3.OperationalError("database or disk is full")]
)
def test_full_disk_is_a_user_error(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=r"cannot write .*set: .*(No space left|disk is full)"):
        fill(tmp_path / "set", fail)


def test_empty_folder_is_filled_and_full_one_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "set"
    out.mkdir(parents=True)
    fill(out)
    (out / "a").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder: give another OUT"):
        fill(out)
    assert (out / "a").read_text() == "mine"
    assert names(out.parent) == {"set"}


def test_out_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(UserError, match="file"):
            fill(out)
    assert names(tmp_path) == {"file"}


def test_leftovers_of_killed_processes_are_deleted_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    folders = {name: tmp_path / f".{name}.partial" for name in ("set.dead", "set.alive", "sets.dead")}
    for folder in folders.values():
        folder.mkdir()
        (folder / ".lock").touch()
    with (folders["set.alive"] / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fill(tmp_path / "set")
    assert names(tmp_path) == {"set", ".set.alive.partial", ".sets.dead.partial"}


def test_two_processes_with_one_target_do_not_disturb_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        fill(tmp_path / "set", meanwhile=lambda: fill(tmp_path / "set"))
    assert names(tmp_path) == {"set"}
    assert names(tmp_path / "set") == {"a"}


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    fill(tmp_path / "set")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "set").stat().st_mode == (tmp_path / "plain").stat().st_mode
