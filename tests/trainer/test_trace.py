"""The trace of a training: the steps asked for, no others."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from trainer.trace import traced

TABLE, TRACE = "profile_000000kimg.txt", "profile_000000kimg.json.gz"


def steps(profile: int, total: int, folder: Path, nimg: int = 0) -> None:
    x = torch.randn(8, 8)
    with traced(profile, torch.device("cpu"), folder, nimg) as end_step:
        for step in range(total):
            x.mm(x) if 10 <= step < 13 else x.add(x)
            end_step()


def test_only_the_steps_asked_for_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps(3, 20, tmp_path)
    table = (tmp_path / TABLE).read_text()
    assert table.startswith("3 steps\n")
    assert "aten::mm" in table
    assert "aten::add" not in table
    events = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3
    assert f"traced 3 steps: {tmp_path / TABLE}" in capsys.readouterr().err


def test_a_training_that_ends_during_the_trace_has_fewer_steps_in_it(tmp_path: Path) -> None:
    steps(3, 12, tmp_path)
    assert (tmp_path / TABLE).read_text().startswith("2 steps\n")


def test_a_training_that_goes_on_keeps_the_earlier_trace(tmp_path: Path) -> None:
    steps(3, 13, tmp_path)
    before = (tmp_path / TABLE).read_bytes()
    steps(2, 12, tmp_path, nimg=120_400)
    assert (tmp_path / TABLE).read_bytes() == before
    assert (tmp_path / "profile_000120kimg.txt").read_text().startswith("2 steps\n")
    assert (tmp_path / "profile_000120kimg.json.gz").is_file()


@pytest.mark.parametrize(("profile", "total"), [(0, 20), (3, 9), (3, 10)])
def test_nothing_is_written_without_the_option_or_when_training_ends_before(
    profile: int, total: int, tmp_path: Path
) -> None:
    steps(profile, total, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / TABLE).symlink_to("/dev/full")
    steps(3, 20, tmp_path)
    assert "warning: the trace cannot be written" in capsys.readouterr().err
