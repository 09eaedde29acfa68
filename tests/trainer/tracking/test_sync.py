"""Trainings without a server, or whose server goes away, and ``cattrain sync``."""

from __future__ import annotations

import contextlib
import random
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import onnx
import pytest
from mlflow.tracking import MlflowClient

from catgan.command import UserError
from export.registry import register
from tests.trainer.tracking.runs import CONFIG, MANIFEST, begin, end, events, make_image, points, track
from trainer.cli import main
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker, end_run, is_finished, mlflow_run_id, sync

pytestmark = pytest.mark.slow


def train_offline(folder: Path, uri: str, name: str, onnx_file: Path) -> str:
    """All records of a training that is interrupted, continued and finished without a server."""
    key = begin(folder, uri, offline=True)
    (folder / "best").mkdir()
    tracker = Tracker(folder)
    tracker.rewind(0)
    tracker.log_grid("fakes", 0, make_image(folder / "0.png"))
    for nimg in range(1000, 30_000, 1000):
        tracker.log_scalars({f"x{i}": nimg + i for i in range(60)}, nimg)
    tracker.note("checkpoint", "could not be written", 29_000)
    tracker.close()
    end(folder, uri, "KILLED", offline=True)
    assert begin(folder, uri, offline=True, run_id=key, config=CONFIG | {"kimg": 31.0}) == key
    tracker = Tracker(folder)
    tracker.rewind(20_000)
    for nimg in range(21_000, 32_000, 1000):
        tracker.log_scalars({f"x{i}": nimg + i for i in range(60)}, nimg)
    tracker.log_grid("fakes", 31_000, make_image(folder / "31.png"))
    tracker.note("resumed", "from 20 kimg", 20_000)
    tracker.close()
    onnx = Path(shutil.copy(onnx_file, folder / "best"))
    info = {"recipe": "tiny", "kimg": 31.0, "metric": {"name": "fid2k", "value": 3.0}, "dataset_digest": "dada"}
    tracker = Tracker(folder)
    tracker.log_model(name, onnx, info)
    end(folder, uri, "FINISHED", offline=True)
    return key


def everything(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """All that MLflow has of a run."""
    run = client.get_run(run_id)
    found = client.search_runs([run.info.experiment_id], f"tags.`catgan.run` = '{run.data.tags['catgan.run']}'")
    folders = ("", "images", "samples")
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    return {
        "runs": [r.info.run_id for r in found],
        "status": (run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": run.data.tags,
        "inputs": [data.dataset.digest for data in run.inputs.dataset_inputs],
        "metrics": {
            key: [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "files": [(f.path, f.file_size) for folder in folders for f in client.list_artifacts(run_id, folder)],
        "events": events(client, run_id),
        "models": [(o.model_id, o.step) for o in outputs],
        "versions": [
            (v.version, v.current_stage, v.tags) for v in client.search_model_versions(f"run_id = '{run_id}'")
        ],
    }


def test_a_training_without_a_server_is_delivered_later(
    client: MlflowClient,
    uri: str,
    folder: Path,
    onnx_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as offline:
        for module in ("tracker", "delivery", "server"):
            offline.setattr(f"trainer.tracking.{module}.connect", None)
        key = train_offline(folder, uri, "offline", onnx_file)
        assert key.startswith("offline-")
        assert mlflow_run_id(folder) is None
        assert is_finished(folder)
    assert f"records are not in MLflow yet; `cattrain sync {folder}`" in capsys.readouterr().err

    synced = main(["sync", str(folder)])
    run_id = synced["mlflow_run_id"]
    assert synced == {"run_dir": str(folder), "mlflow_run_id": run_id, "delivered": 42}
    found = everything(client, run_id)
    assert found["runs"] == [run_id]
    opened, *_, ended = Journal(folder / "outbox.jsonl").records()
    assert found["status"] == ("FINISHED", opened["time"], ended["time"])
    assert found["params"]["kimg"] == "1.5"
    assert found["tags"]["resumed.kimg"] == "31.0"
    assert found["tags"]["catgan.run"] == key
    assert found["inputs"] == [MANIFEST.digest[:36]]
    for i in range(60):
        # Sorted, since a tracker's clock runs ahead when it logs more than one record in a millisecond.
        assert sorted((step, value) for step, value, _ in found["metrics"][f"x{i}"]) == [
            (kimg, kimg * 1000 + i) for kimg in range(1, 32)
        ]
    assert [line.partition(" UTC  ")[2] for line in found["events"]] == [
        "checkpoint  29 kimg: could not be written",
        "resumed  20 kimg: from 20 kimg",
    ]
    assert len([path for path, _ in found["files"] if path.startswith("images/")]) == 4
    assert [str(version) for version, *_ in found["versions"]] == ["1"]

    assert main(["sync", str(folder)])["delivered"] == 0
    assert everything(client, run_id) == found

    # Continued with a server: the same run.
    assert begin(folder, uri, run_id=key) == key
    assert mlflow_run_id(folder) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_sync_that_is_interrupted_anywhere_delivers_nothing_twice(
    client: MlflowClient, uri: str, folder: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each kind of request, the connection breaks at least once after MLflow has carried it out."""
    train_offline(folder, uri, "cut-off", onnx_file)
    requests = [
        *("create_run", "log_batch", "log_inputs", "log_artifact", "set_tag", "set_terminated", "update_run"),
        *("create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs", "log_text"),
        *("create_registered_model", "create_model_version", "set_registered_model_alias"),
    ]
    tried: dict[str, int] = dict.fromkeys(requests, 0)
    chance = random.Random(0)

    def breaking(name: str) -> Any:
        real = getattr(MlflowClient, name)

        def request(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            tried[name] += 1
            if tried[name] == 1 or chance.random() < 0.3:
                raise ConnectionResetError("cut off")
            return result

        return request

    with monkeypatch.context() as broken:
        for name in requests:
            broken.setattr(MlflowClient, name, breaking(name))
        for _ in range(100):
            with contextlib.suppress(UserError):
                sync(folder, register=register)
                break
        else:
            pytest.fail(str(tried))
    assert all(tried.values()), tried
    run_id = mlflow_run_id(folder)
    assert run_id is not None
    found = everything(client, run_id)
    assert found["runs"] == [run_id]
    assert [len(found["metrics"][f"x{i}"]) for i in range(60)] == [31] * 60
    assert len([path for path, _ in found["files"] if path.startswith("images/")]) == 4
    assert (len(found["events"]), len(found["models"]), len(found["versions"])) == (2, 1, 1)
    (folder / "outbox.json").unlink()  # deliver everything again
    sync(folder, register=register)
    again = everything(client, run_id)
    assert mlflow_run_id(folder) == run_id
    assert again == found


def test_a_training_whose_server_went_away_ends_and_is_delivered_to_another(
    folder: Path, tmp_path: Path, client: MlflowClient, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://me:secret@127.0.0.1:{closed.getsockname()[1]}"
        begin(folder, away, offline=True)  # as if it had answered
        tracker = track(folder, away)
        tracker.log_scalars({"x": 1.0}, 1000)
        tracker.close()
        end(folder, away, "FINISHED")
        output = capsys.readouterr().err
        assert "warning: MLflow at http://127" in output
        assert f"3 records are not in MLflow yet; `cattrain sync {folder}`" in output
        with pytest.raises(UserError, match=r"does not answer.*3 of 3 records are left"):
            main(["sync", str(folder)])
    assert "secret" not in output
    for path in folder.iterdir():
        assert "secret" not in path.read_text(), path
    moved = folder.rename(tmp_path / "moved")
    run_id = main(["sync", str(moved), "--uri", uri])["mlflow_run_id"]
    assert points(client, run_id, "x") == [(1, 1.0)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_model_that_was_replaced_before_it_was_delivered_is_not_registered(
    client: MlflowClient, uri: str, folder: Path, onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished training that is trained further: each version has the metric of its own file."""
    begin(folder, uri, offline=True)
    (folder / "best").mkdir()
    tracker = Tracker(folder)
    for value in (5.0, 3.0):
        model = onnx.load(onnx_file)
        onnx.helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, "value": str(value)})
        onnx.save(model, folder / "best" / "gen.onnx")
        metric = {"name": "fd16_efflite0", "value": value}
        tracker.log_model("replaced", folder / "best" / "gen.onnx", {"recipe": "tiny", "kimg": 1.0, "metric": metric})
    sync(folder, register=register)
    assert "skipped a record of kind model (best/gen.onnx): a later gen.onnx has replaced it" in capsys.readouterr().err
    (version,) = client.search_model_versions("name = 'replaced'")
    assert version.tags["metric_value"] == "3.0"


def test_the_printed_command_quotes_the_location(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my cats' run"
    folder.mkdir()
    begin(folder, uri, offline=True)
    end(folder, uri, "KILLED", offline=True)
    (command,) = re.findall("`(.*)`", capsys.readouterr().err)
    assert main(shlex.split(command)[1:])["delivered"] == 2
    begin(folder, "http://me:secret@gpu0:5000", offline=True)
    end_run(folder, "http://me:secret@gpu0:5000", "KILLED", True, register=register, location="s3://cats/mine")
    printed = capsys.readouterr().err
    assert "`cattrain sync s3://cats/mine`, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD set," in printed
    assert "secret" not in printed


def test_sync_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"outbox\.jsonl"):
        main(["sync", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
