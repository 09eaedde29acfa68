"""The checkpoints that a training keeps are logged models of its run."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from export.registry import register
from tests.trainer.tracking.runs import begin, end, points, track
from trainer.checkpoints.checkpoint import folder_name
from trainer.tracking.server import sqlite_path
from trainer.tracking.tracker import Tracker, mlflow_run_id, sync

VALUES = {1000: 90.0, 2000: 50.0, 3000: 70.0, 4000: 60.0}  # the best is the second


def log(tracker: Tracker, values: dict[int, float]) -> None:
    """Evaluate and save at each position; the two latest checkpoints are kept."""
    for nimg in values:
        known = {n: values[n] for n in sorted(values) if n <= nimg}
        results = {n: {"name": "fd2k_efflite0", "value": value, "kimg": n / 1000} for n, value in known.items()}
        tracker.log_scalars({"fd2k_efflite0": values[nimg], "diversity": 0.8}, nimg)
        kept = [folder_name(n) for n in known][-2:]
        best = results[min(known, key=lambda n: known[n])]
        tracker.log_checkpoint(nimg=nimg, kept=kept, recipe="tiny", metric=results[nimg], best=best)


def models(client: MlflowClient, run_id: str) -> dict[str, LoggedModel]:
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert len({model.name for model in found}) == len(found)
    return {model.name: model for model in found}


def num_created(uri: str, run_id: str) -> int:
    """Number of logged models of the run in the database, with those that were deleted."""
    path = sqlite_path(uri)
    assert path is not None
    with sqlite3.connect(path) as database:
        (count,) = database.execute("select count(*) from logged_models where source_run_id = ?", [run_id]).fetchone()
    return int(count)


def test_kept_checkpoints_are_models_with_their_metric(
    client: MlflowClient, uri: str, run_id: str, folder: Path
) -> None:
    tracker = track(folder, uri)
    log(tracker, VALUES)
    tracker.close()
    outputs = client.get_run(run_id).outputs
    assert outputs is None or not outputs.model_outputs, "only what stays becomes an output"
    for _ in range(2):
        end(folder, uri, "FINISHED")
    found = models(client, run_id)
    expected = {"best": 2000, folder_name(3000): 3000, folder_name(4000): 4000}
    assert found.keys() == expected.keys()
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    steps = {output.model_id: output.step for output in outputs.model_outputs}
    assert len(outputs.model_outputs) == len(expected)
    for name, nimg in expected.items():
        model = found[name]
        assert (str(model.status), model.model_type, steps[model.model_id]) == ("READY", "checkpoint", nimg // 1000)
        (metric,) = model.metrics
        assert (metric.key, metric.value, metric.step) == ("fd2k_efflite0", VALUES[nimg], nimg // 1000)
        assert (metric.dataset_name, metric.run_id) == ("cats64", run_id)
        assert model.tags == {
            "catgan.checkpoint": "best/gen.safetensors" if name == "best" else name,
            "recipe": "tiny",
            "kimg": str(nimg // 1000),
            "metric": "fd2k_efflite0",
            "metric_value": str(VALUES[nimg]),
        }
    assert sorted(points(client, run_id, "fd2k_efflite0")) == [(n // 1000, v) for n, v in VALUES.items()], "once each"
    best = client.search_logged_models(
        [found["best"].experiment_id],
        f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "metrics.fd2k_efflite0", "ascending": True}],
    )[0]
    assert best.name == "best"


def test_models_follow_a_training_that_is_delivered_as_it_goes(
    client: MlflowClient, uri: str, run_id: str, folder: Path
) -> None:
    """As after a resume, each checkpoint is delivered by another process. Sending a record again adds nothing."""
    ids: dict[str, set[str]] = {}
    for nimg, best in ((1000, None), (2000, None), (3000, None), (4000, 2000)):
        tracker = Tracker(folder)
        tracker.rewind(0)  # repeats what the outbox has
        log(tracker, {n: value for n, value in VALUES.items() if n <= nimg})
        for _ in range(2):
            (folder / "outbox.files.json").unlink(missing_ok=True)
            sync(folder, uri, register=register)
            for name, model in models(client, run_id).items():
                ids.setdefault(name, set()).add(model.model_id)
        kept = {folder_name(n) for n in (nimg - 1000, nimg) if n}
        assert models(client, run_id).keys() == kept | ({"best"} if best else set())
    assert {len(known) for known in ids.values()} == {1}
    assert num_created(uri, run_id) == 4 + 1
    assert sorted(points(client, run_id, "fd2k_efflite0")) == [(n // 1000, v) for n, v in VALUES.items()]


def test_late_delivery_creates_only_what_is_kept(client: MlflowClient, uri: str, folder: Path) -> None:
    begin(folder, uri, offline=True)
    tracker = Tracker(folder)
    log(tracker, VALUES)
    end(folder, uri, "KILLED", offline=True)
    sync(folder, uri, register=register)
    run_id = mlflow_run_id(folder)
    assert run_id is not None
    assert models(client, run_id).keys() == {"best", folder_name(3000), folder_name(4000)}
    assert num_created(uri, run_id) == 3
    assert client.get_run(run_id).info.status == "KILLED"


@pytest.mark.parametrize("step", ["log_metric", "finalize_logged_model", "log_outputs"])
def test_an_interrupted_update_is_completed(
    client: MlflowClient, uri: str, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    original = getattr(MlflowClient, step)
    failures = [MlflowException("the connection was lost")]

    def fail_once(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args, **options)

    log(Tracker(folder), {1000: 90.0})
    monkeypatch.setattr(MlflowClient, step, fail_once)
    end(folder, uri, "FINISHED")
    assert not failures
    sync(folder, uri, register=register)
    (model,) = models(client, run_id).values()
    outputs = client.get_run(run_id).outputs
    assert outputs is not None
    assert len(outputs.model_outputs) == 1
    assert str(model.status) == "READY"
    assert [(metric.step, metric.value) for metric in model.metrics] == [(1, 90.0)]
    assert num_created(uri, run_id) == 1
    assert points(client, run_id, "fd2k_efflite0") == [(1, 90.0)]


def test_a_changed_metric_makes_another_model(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    for value in (90.0, 80.0):  # the checkpoint was damaged, and is repeated with another number of workers
        tracker = track(folder, uri)
        tracker.rewind(0)
        log(tracker, {1000: value})
        tracker.close()
    (model,) = models(client, run_id).values()
    assert [metric.value for metric in model.metrics] == [80.0]


def test_a_checkpoint_without_a_metric(client: MlflowClient, run_id: str, tracker: Tracker) -> None:
    """After a stop between evaluations, or with one that is not finite."""
    inf = {"name": "fd2k_efflite0", "value": float("inf"), "kimg": 1.0}
    tracker.log_checkpoint(nimg=1000, kept=[folder_name(1000)], recipe="tiny", metric=None, best=None)
    tracker.log_checkpoint(nimg=2000, kept=[folder_name(n) for n in (1000, 2000)], recipe="tiny", metric=inf, best=inf)
    tracker.close()
    assert {name: model.metrics for name, model in models(client, run_id).items()} in (
        {folder_name(1000): None, folder_name(2000): None},
        {folder_name(1000): [], folder_name(2000): []},
    )


def test_the_exported_generator_takes_the_place_of_the_best(
    client: MlflowClient, uri: str, run_id: str, folder: Path, onnx_file: Path
) -> None:
    tracker = track(folder, uri)
    log(tracker, VALUES)
    tracker.close()
    assert "best" in models(client, run_id)
    onnx = folder / "gen.onnx"
    onnx.write_bytes(onnx_file.read_bytes())
    metric = {"name": "fd2k_efflite0", "value": 50.0}
    Tracker(folder).log_model("of_checkpoints", onnx, {"recipe": "tiny", "kimg": 2.0, "metric": metric})
    end(folder, uri, "FINISHED")
    kept = {folder_name(3000), folder_name(4000)}
    assert models(client, run_id).keys() == {"generator", *kept}
    log(Tracker(folder), {**VALUES, 5000: 55.0, 6000: 45.0, 7000: 65.0, 8000: 64.0})  # trained further
    end(folder, uri, "KILLED")
    assert models(client, run_id).keys() == {"generator", "best", folder_name(7000), folder_name(8000)}
    assert models(client, run_id)["best"].tags["kimg"] == "6"
