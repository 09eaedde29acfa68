"""What is logged reaches ``metrics.jsonl`` and MLflow, also when a training is continued."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from catgan.command import UserError
from tests.trainer.tracking.runs import CONFIG, begin, end, events, images, make_image, points, track
from trainer.report.history import read
from trainer.tracking.tracker import Tracker, is_finished, mlflow_run_id


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_is_full_from_the_start_is_one_error(
    folder: Path,
    uri: str,
    capsys: pytest.CaptureFixture[str],  # which keeps stderr out of a file: its size is limited
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=r"outbox.jsonl cannot be written; free some space and run"):
            begin(folder, uri, offline=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    begin(folder, uri, offline=True)


def test_scalars_are_in_the_file_at_once_and_in_mlflow_after_close(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, uri: str
) -> None:
    tracker.log_scalars({"loss/generator": 2.0, "fid2k": 90.5}, 2048)
    tracker.log_scalars({"loss/generator": 1.0, "lost": float("nan"), "high": float("inf")}, 4096)
    assert metrics(folder) == [
        {"nimg": 2048, "kimg": 2.048, "loss/generator": 2.0, "fid2k": 90.5},
        {"nimg": 4096, "kimg": 4.096, "loss/generator": 1.0, "lost": None, "high": None},
    ]
    tracker.close()
    assert points(client, run_id, "loss/generator") == [(2, 2.0), (4, 1.0)]
    assert points(client, run_id, "fid2k") == [(2, 90.5)]
    assert math.isnan(points(client, run_id, "lost")[0][1])
    assert points(client, run_id, "high")[0][1] > 1e300
    assert not is_finished(folder)
    end(folder, uri, "FINISHED")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert is_finished(folder)


def test_points_that_share_a_kimg_are_all_kept(client: MlflowClient, tracker: Tracker, run_id: str) -> None:
    for nimg in range(100, 1000, 100):
        tracker.log_scalars({"loss/generator": float(nimg), "lr": 1.0}, nimg)
    tracker.close()
    assert points(client, run_id, "loss/generator") == [(0, float(nimg)) for nimg in range(100, 1000, 100)]
    assert points(client, run_id, "lr") == [(0, 1.0)] * 9


def test_grids_are_images_and_artifacts(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, tmp_path: Path
) -> None:
    for nimg in (2000, 4000):
        tracker.log_grid("fakes", nimg, make_image(folder / f"fakes_{nimg // 1000:06d}kimg.png", nimg % 255))
    (folder / "config.json").write_text("{}")
    tracker.log_artifact(folder / "config.json")
    tracker.close()

    names = images(client, run_id)
    assert len(names) == 4, names  # an image and its thumbnail each; any other file would hide them all in the UI
    assert {name.split("+timestamp")[0] for name in names} == {"fakes+step+2", "fakes+step+4"}
    samples = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert samples == ["samples/fakes_000002kimg.png", "samples/fakes_000004kimg.png"]
    downloaded = client.download_artifacts(run_id, samples[0], str(tmp_path))
    assert Path(downloaded).read_bytes() == (folder / "fakes_000002kimg.png").read_bytes()
    assert "config.json" in [file.path for file in client.list_artifacts(run_id)]


def test_notes_are_tags_and_events(client: MlflowClient, tracker: Tracker, run_id: str) -> None:
    tracker.note("checkpoint", "could not be written\nto s3://me:secret@host/bucket", 2500)
    tracker.note("resumed", "from 2 kimg", 2000)
    tracker.note("checkpoint", "written again", 3000)
    tracker.close()
    tags = client.get_run(run_id).data.tags
    assert (tags["note.checkpoint"], tags["note.resumed"]) == ("3 kimg: written again", "2 kimg: from 2 kimg")
    lines = events(client, run_id)
    assert [line.partition(" UTC  ")[2] for line in lines] == [
        "checkpoint  2.5 kimg: could not be written to s3://host/bucket",
        "resumed  2 kimg: from 2 kimg",
        "checkpoint  3 kimg: written again",
    ]


def test_rewind_removes_later_and_incomplete_lines(tracker: Tracker, folder: Path) -> None:
    tracker.rewind(0)
    assert not (folder / "metrics.jsonl").exists()
    for nimg in (1000, 2000, 3000):
        tracker.log_scalars({"x": 1.0}, nimg)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"nimg": 2000, "ki')
    tracker.rewind(2000)
    tracker.log_scalars({"x": 2.0}, 3000)
    assert [(r["nimg"], r["x"]) for r in metrics(folder)] == [(1000, 1.0), (2000, 1.0), (3000, 2.0)]
    # Hidden files are the lock and temporary files of deliveries.
    files = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    written = {"metrics.jsonl", "outbox.jsonl"}  # the states follow with the deliveries
    assert written <= files <= written | {"outbox.files.json", "outbox.json"}


def test_equal_values_of_repeated_steps_are_recorded_once(
    client: MlflowClient, uri: str, run_id: str, folder: Path
) -> None:
    """Killed at 5.5 kimg, continued from a checkpoint at 4."""
    first = track(folder, uri)
    first.rewind(0)
    for nimg in (1000, 2000, 3000, 4000, 5000, 5500):
        first.log_scalars({"x": nimg / 1000, "lost": math.nan, "speed": nimg + 1.0}, nimg)
    first.close()
    second = track(folder, uri)
    second.rewind(4000)
    for nimg in (5000, 5500, 6000):
        second.log_scalars({"x": nimg / 1000, "lost": math.nan, "speed": nimg + 2.0, "new": 1.0}, nimg)
    second.close()
    assert points(client, run_id, "x") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (5, 5.5), (6, 6.0)]
    assert [step for step, _ in points(client, run_id, "lost")] == [1, 2, 3, 4, 5, 5, 6]
    assert points(client, run_id, "speed")[4:] == [(5, 5001.0), (5, 5501.0), (5, 5002.0), (5, 5502.0), (6, 6002.0)]
    assert [step for step, _ in points(client, run_id, "new")] == [5, 5, 6]
    assert [r["nimg"] for r in metrics(folder)] == [1000, 2000, 3000, 4000, 5000, 5500, 6000]
    assert [r["speed"] for r in metrics(folder)][3:] == [4001.0, 5002.0, 5502.0, 6002.0]


def test_the_last_point_at_a_step_is_that_of_the_current_networks(
    client: MlflowClient, uri: str, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an abandoned value follows an equal one, and on a machine whose clock is behind."""
    for time, start, values in (
        (2_000_000_000_000, 0, {4500: 4.0, 5000: 5.0, 5500: 6.0, 6000: 7.0}),
        (1_000_000_000_000, 4000, {4500: 4.0, 5000: 8.0, 5500: 6.0}),
        (1_500_000_000_000, 4000, {4500: 9.0, 6000: 7.0}),
    ):
        monkeypatch.setattr("trainer.tracking.tracker._now", lambda time=time: time)
        tracker = track(folder, uri)
        tracker.rewind(start)
        for nimg, value in values.items():
            tracker.log_scalars({"fid2k": value}, nimg)
        tracker.close()
    assert points(client, run_id, "fid2k") == [
        *((4, 4.0), (5, 5.0), (5, 6.0), (6, 7.0)),
        *((5, 8.0), (5, 6.0)),  # 4.0 is repeated
        *((4, 9.0), (6, 7.0)),
    ]
    last = dict(points(client, run_id, "fid2k"))
    assert {r["nimg"] // 1000: r["fid2k"] for r in metrics(folder)} == {4: last[4], 6: last[6]}


def test_the_registered_metric_is_in_the_chart_after_a_rollback(
    client: MlflowClient, uri: str, run_id: str, folder: Path, onnx_file: Path
) -> None:
    (folder / "best").mkdir()
    onnx = Path(shutil.copy(onnx_file, folder / "best"))
    for start, values in ((0, (90.0, 80.0, 60.0)), (2000, (80.0, 75.0, 65.0))):
        tracker = track(folder, uri)
        tracker.rewind(start)
        for i, value in enumerate(values):
            tracker.log_scalars({"fd16_efflite0": value}, start + 1000 * (i + 1))
        tracker.close()
    best = read(folder).best("fd16_efflite0")
    assert best is not None
    tracker = track(folder, uri)
    metric = {"name": "fd16_efflite0", "value": best["fd16_efflite0"], "kimg": best["kimg"], "n_fake": 16}
    tracker.log_model("rolled-back", onnx, {"recipe": "tiny", "kimg": best["kimg"], "metric": metric})
    tracker.close()
    version = client.get_model_version("rolled-back", "1")
    shown = dict(points(client, run_id, version.tags["metric"]))
    assert shown[int(float(version.tags["kimg"]))] == float(version.tags["metric_value"]) == 65.0


def test_a_repeated_grid_replaces_the_one_before(
    client: MlflowClient, uri: str, run_id: str, folder: Path, tmp_path: Path
) -> None:
    for colour in (1, 2):
        tracker = track(folder, uri)
        tracker.rewind(0)
        for nimg in (0, 4000):
            tracker.log_grid("fakes", nimg, make_image(folder / f"{nimg}.png", colour))
        tracker.close()
    shown = [name for name in images(client, run_id) if name.endswith(".png")]
    assert [name.partition("+timestamp")[0] for name in shown] == ["fakes+step+0", "fakes+step+4"]
    for path in (f"images/{shown[1]}", "samples/4000.png"):
        with Image.open(client.download_artifacts(run_id, path, str(tmp_path))) as image:
            assert image.getpixel((0, 0)) == (2, 0, 0)


def test_a_run_is_reopened(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    first = track(folder, uri)
    first.log_scalars({"x": 1.0}, 1000)
    first.close()
    end(folder, uri, "FAILED")
    assert begin(folder, uri, config=CONFIG | {"kimg": 3.0, "new": 1}, run_id=run_id) == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "first")
    assert run.data.params["kimg"] == "1.5"
    assert run.data.tags["resumed.kimg"] == "3.0"
    assert [key for key in run.data.tags if key.startswith("resumed.")] == ["resumed.kimg"]
    assert run.data.params["new"] == "1"
    assert len(run.inputs.dataset_inputs) == 1
    second = track(folder, uri)
    second.log_scalars({"x": 2.0}, 2000)
    second.close()
    assert points(client, run_id, "x") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id).info.status == "RUNNING"
    end(folder, uri, "KILLED")
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_run_whose_folder_has_no_outbox_is_reopened(uri: str, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert begin(tmp_path / "other", uri, run_id=run_id) == run_id
    assert mlflow_run_id(tmp_path / "other") == run_id


def test_a_training_that_was_killed_while_it_was_opened_reopens_its_run(uri: str, folder: Path, run_id: str) -> None:
    assert begin(folder, uri) == run_id
    (folder / "outbox.json").unlink()
    assert begin(folder, uri) == run_id


def test_an_unknown_run_is_an_error_of_the_user(uri: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no run 0123.*tracking URI"):
        begin(folder, uri, run_id="0123")


def test_a_deleted_run_is_an_error_of_the_user(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    client.delete_run(run_id)
    with pytest.raises(UserError, match="mlflow runs restore"):
        begin(folder, uri, run_id=run_id)


def test_a_tracker_on_a_machine_without_the_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not on this machine"):
        track(tmp_path, f"sqlite:///{tmp_path}/elsewhere.db")
    assert not (tmp_path / "elsewhere.db").exists()
