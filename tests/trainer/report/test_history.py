from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.report.history import read


def opened(num: int, digest: str) -> dict[str, Any]:
    return {"kind": "open", "time": 0, "params": {"eval.num": str(num)}, "dataset": {"digest": digest}}


def evaluated(nimg: int, value: float) -> dict[str, Any]:
    return {"kind": "scalars", "time": 0, "nimg": nimg, "values": {"fid2k": value, "loss/generator": 1.0}}


def write_run(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "outbox.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [{"nimg": r["nimg"], "kimg": r["nimg"] / 1000, **r["values"]} for r in records if r["kind"] == "scalars"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_best_evaluation_is_one_with_the_latest_settings(tmp_path: Path) -> None:
    """As in training, where a change of the number of images or the data resets the best metric."""
    records = [opened(2048, "a"), evaluated(1000, 5.0), opened(2999, "a"), evaluated(2000, 9.0), evaluated(3000, 8.0)]
    for more, best in (
        ([], 3000),
        ([evaluated(4000, 8.5), opened(2999, "a"), evaluated(5000, 7.0), evaluated(6000, 7.5)], 5000),
        ([opened(2999, "b"), evaluated(4000, 20.0)], 4000),
    ):
        write_run(tmp_path, records + more)
        row = read(tmp_path).best("fid2k")
        assert row is not None
        assert row["nimg"] == best


def test_the_best_evaluation_of_a_run_without_records_for_mlflow(tmp_path: Path) -> None:
    write_run(tmp_path, [evaluated(1000, 5.0), evaluated(2000, 9.0)])
    (tmp_path / "outbox.jsonl").unlink()
    row = read(tmp_path).best("fid2k")
    assert row is not None
    assert row["nimg"] == 1000
    assert read(tmp_path).best("kid2k") is None


@pytest.mark.parametrize("name", ["fid50k", "fd2k_efflite0", "fd2k_inception-1a2b3c4d", "kid300_opennsfw"])
def test_every_name_of_a_metric_is_found(name: str, tmp_path: Path) -> None:
    row = {"nimg": 1000, "kimg": 1.0, name: 5.0, "loss/generator": 1.0, "fid/tabby": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert read(tmp_path).metric_names == [name]


def test_a_clock_that_is_set_back_takes_nothing_from_the_time(tmp_path: Path) -> None:
    times = [0, 10_000, 4_000, 9_000]
    write_run(tmp_path, [opened(64, "a"), *(evaluated(1000 * i, 5.0) for i in (1, 2, 3))])
    records = [
        json.loads(line) | {"time": t} for t, line in zip(times, (tmp_path / "outbox.jsonl").open(), strict=True)
    ]
    (tmp_path / "outbox.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = read(tmp_path)
    assert run.seconds == 15
    assert list(run.hours.values())[-1] == pytest.approx(15 / 3600)
