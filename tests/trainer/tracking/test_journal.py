from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.tracking.journal import Journal


def contents(journal: Journal) -> list[int]:
    return [record["n"] for record in journal.records()]


def test_records_are_read_in_order_from_any_position(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert contents(journal) == []
    for n in range(3):
        journal.append({"n": n})
    ends = [end for _, end in journal.read()]
    assert ends[-1] == (tmp_path / "j").stat().st_size
    assert [record for record, _ in journal.read(ends[0])] == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("incomplete", ['{"n": 7', '{"n": 7}', "{"])
def test_an_incomplete_last_line_is_ignored_and_then_removed(tmp_path: Path, incomplete: str) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"n": 0})
    with (tmp_path / "j").open("a") as file:
        file.write(incomplete)
    assert contents(journal) == [0]
    Journal(tmp_path / "j").append({"n": 1})
    assert contents(journal) == [0, 1]
    (tmp_path / "j").write_text(incomplete)
    journal.append({"n": 2})
    assert contents(journal) == [2]


def test_a_full_disk_delays_records_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"n": 0})

    def full(descriptor: int) -> None:
        # A disk that fills up in the middle of a line.
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        journal.append({"n": 1})
        journal.append({"n": 2})
    assert contents(journal) == [0]
    journal.append({"n": 3})
    assert contents(journal) == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("No space left") == 1
    journal.flush()
    assert contents(journal) == [0, 1, 2, 3]


def test_keep_removes_other_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.keep(lambda record: True)
    assert list(tmp_path.iterdir()) == []
    for n in range(4):
        journal.append({"n": n})
    journal.keep(lambda record: record["n"] < 2)
    journal.append({"n": 9})
    assert contents(journal) == [0, 1, 9]
    assert [p.name for p in tmp_path.iterdir()] == ["j"]
