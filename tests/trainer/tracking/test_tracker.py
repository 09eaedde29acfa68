"""The tracker against a real SQLite store; one database serves the whole module, since making one takes seconds."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from catgan.command import UserError
from export.generator import export_onnx
from trainer.cli import main
from trainer.config import ModelConfig
from trainer.data.manifest import Manifest, Shard, Split
from trainer.models import build_generator
from trainer.tracking.journal import Journal
from trainer.tracking.outbox import Outbox
from trainer.tracking.server import connect, resolve_uri
from trainer.tracking.tracker import Tracker, _code_version, end_run, is_finished, mlflow_run_id, open_run, sync

CONFIG: dict[str, Any] = {
    "recipe": "tiny",
    "kimg": 1.5,
    "augment": {"policy": ("colour", "cutout"), "p": {"start": 0.0, "end": 0.5}},
    "track": {"uri": "http://me:secret@host:5000"},
    "long": "x" * 7000,
    "many": {f"value_{i}": i for i in range(150)},
}
MANIFEST = Manifest(
    root="/data/cats64",
    size=64,
    splits={"train": Split((Shard("train-000000.tar", 90, "ab" * 32, 1),)), "val": Split(())},
    seed=0,
    source=("cats.zip",),
    options={},
    tool="test",
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri(None, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return connect(uri)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    return folder


def begin(folder: Path, uri: str, **options: Any) -> str:
    return open_run(folder, uri, "catgan", **{"config": CONFIG, "manifest": MANIFEST, **options})


@pytest.fixture
def run_id(uri: str, folder: Path) -> str:
    return begin(folder, uri)


@pytest.fixture
def tracker(uri: str, run_id: str, folder: Path) -> Iterator[Tracker]:
    tracker = Tracker(folder, uri)
    yield tracker
    tracker.close()


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def picture(path: Path, colour: int = 0) -> Path:
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(path)
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_new_run_is_described(client: MlflowClient, run_id: str, uri: str) -> None:
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("first", "RUNNING")
    params = run.data.params
    assert params["kimg"] == "1.5"
    assert params["augment.policy"] == "colour cutout"
    assert params["augment.p.end"] == "0.5"
    assert params["many.value_149"] == "149"
    assert params["track.uri"] == "http://host:5000"
    assert params["long"] == "x" * 6000
    assert run.data.tags["recipe"] == "tiny"
    assert "catgan.version" in run.data.tags
    experiment = client.get_experiment_by_name("catgan")
    assert experiment is not None
    assert Path(experiment.artifact_location) == Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"


def test_a_disk_that_is_full_from_the_start_is_said_in_a_line(
    folder: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=r"outbox.jsonl cannot be written; make room, then run it again"):
            begin(folder, uri, offline=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    begin(folder, uri, offline=True)


def test_the_data_set_is_the_runs_input(client: MlflowClient, run_id: str) -> None:
    (data,) = client.get_run(run_id).inputs.dataset_inputs
    assert data.dataset.name == "cats64"
    assert data.dataset.digest == MANIFEST.digest[:36]
    assert json.loads(data.dataset.source) == {"uri": "/data/cats64"}
    profile = json.loads(data.dataset.profile)
    assert profile["train_images"] == 90
    assert profile["val_images"] == 0
    assert profile["digest"] == MANIFEST.digest
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}


def test_trainings_on_the_same_data_are_children_of_one_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    def opened(name: str, manifest: Manifest, experiment: str = "comparing", run_id: str | None = None) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return open_run(tmp_path / name, uri, experiment, config=CONFIG, manifest=manifest, run_id=run_id)

    def parent(run_id: str) -> str | None:
        return client.get_run(run_id).data.tags.get("mlflow.parentRunId")

    other = replace(MANIFEST, splits={"train": Split((Shard("train-000000.tar", 90, "cd" * 32, 1),)), "val": Split(())})
    first = opened("first", MANIFEST)
    alone, elsewhere = opened("alone", other), opened("elsewhere", MANIFEST, "another")
    assert [parent(run_id) for run_id in (first, alone, elsewhere)] == [None] * 3
    opened("first", MANIFEST, run_id=first)
    assert parent(first) is None, "a training that goes on is no second one"

    second = opened("second", MANIFEST)
    both = parent(first)
    assert both is not None
    group = client.get_run(both)
    assert (group.info.run_name, group.info.status) == (f"cats64 {MANIFEST.digest[:8]}", "FINISHED")
    assert group.inputs.dataset_inputs[0].dataset.digest == MANIFEST.digest[:36]
    client.set_tag(second, "mlflow.parentRunId", first)  # somebody sorts it otherwise
    third = opened("third", MANIFEST)
    opened("second", MANIFEST, run_id=second)
    assert [parent(run_id) for run_id in (first, second, third)] == [both, first, both]
    assert parent(alone) is None
    experiment = client.get_experiment_by_name("comparing")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 5


def test_scalars_reach_the_file_at_once_and_mlflow_by_close(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, uri: str
) -> None:
    tracker.log_scalars({"loss/generator": 2.0, "fid2k": 90.5}, 2048)
    tracker.log_scalars({"loss/generator": 1.0, "lost": float("nan"), "high": float("inf")}, 4096)
    assert records(folder) == [
        {"nimg": 2048, "kimg": 2.048, "loss/generator": 2.0, "fid2k": 90.5},
        {"nimg": 4096, "kimg": 4.096, "loss/generator": 1.0, "lost": None, "high": None},
    ]
    tracker.close()
    assert points(client, run_id, "loss/generator") == [(2, 2.0), (4, 1.0)]
    assert points(client, run_id, "fid2k") == [(2, 90.5)]
    assert math.isnan(points(client, run_id, "lost")[0][1])
    assert points(client, run_id, "high")[0][1] > 1e300
    assert not is_finished(folder)
    end_run(folder, uri, "FINISHED")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert is_finished(folder)


def test_points_that_share_a_kimg_are_all_kept(client: MlflowClient, tracker: Tracker, run_id: str) -> None:
    for nimg in range(100, 1000, 100):
        tracker.log_scalars({"loss/generator": float(nimg), "lr": 1.0}, nimg)
    tracker.close()
    assert points(client, run_id, "loss/generator") == [(0, float(nimg)) for nimg in range(100, 1000, 100)]
    assert points(client, run_id, "lr") == [(0, 1.0)] * 9


def images(client: MlflowClient, run_id: str) -> list[str]:
    return [Path(file.path).name for file in client.list_artifacts(run_id, "images")]


def test_grids_are_images_and_artifacts(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, tmp_path: Path
) -> None:
    for nimg in (2000, 4000):
        tracker.log_grid("fakes", nimg, picture(folder / f"fakes_{nimg // 1000:06d}kimg.png", nimg % 255))
    (folder / "config.json").write_text("{}")
    tracker.log_artifact(folder / "config.json")
    tracker.close()

    names = images(client, run_id)
    assert len(names) == 4, names  # a picture and its thumbnail each; anything else would hide them all in the UI
    assert {name.split("+timestamp")[0] for name in names} == {"fakes+step+2", "fakes+step+4"}
    samples = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert samples == ["samples/fakes_000002kimg.png", "samples/fakes_000004kimg.png"]
    downloaded = client.download_artifacts(run_id, samples[0], str(tmp_path))
    assert Path(downloaded).read_bytes() == (folder / "fakes_000002kimg.png").read_bytes()
    assert "config.json" in [file.path for file in client.list_artifacts(run_id)]


def test_images_are_named_as_mlflow_names_them(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path
) -> None:
    """Its page shows none of them otherwise."""
    tracker.log_grid("fakes", 2000, picture(folder / "fakes.png"))
    tracker.close()
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    ours = images(client, run_id)
    client.log_image(run_id, Image.new("RGB", (16, 16)), key="fakes", step=2, timestamp=1234567890123, synchronous=True)
    theirs = [name for name in images(client, run_id) if name not in ours]

    def general(names: list[str]) -> list[str]:
        hexadecimal = "[0-9a-f]"
        unique = "-".join(hexadecimal + f"{{{n}}}" for n in (8, 4, 4, 4, 12))
        return sorted(re.sub(unique, "UUID", re.sub(r"\d{13}", "TIME", name)) for name in names)

    assert general(ours) == general(theirs)


def test_the_runs_page_shows_the_latest_grid_and_the_film(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path
) -> None:
    def shown(text: str, path: str) -> str:
        return f"![{text}](get-artifact?path=samples%2F{path}&run_uuid={run_id})"

    tracker.log_grid("fakes", 1000, picture(folder / "first.png"))
    tracker.log_grid("fakes", 2000, picture(folder / "second.png"))
    tracker.log_artifact(picture(folder / "progress.gif"), "samples")
    tracker.close()
    both = f"{shown('fakes at 2 kimg', 'second.png')} {shown('the whole training', 'progress.gif')}"
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == both


def test_a_description_of_ones_own_stays(client: MlflowClient, tracker: Tracker, run_id: str, folder: Path) -> None:
    client.set_tag(run_id, "mlflow.note.content", "Mine. ![a](get-artifact?path=a.png)")
    tracker.log_grid("fakes", 1000, picture(folder / "first.png"))
    tracker.close()
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "Mine. ![a](get-artifact?path=a.png)"


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


def events(client: MlflowClient, run_id: str) -> list[str]:
    return Path(client.download_artifacts(run_id, "events.txt")).read_text().splitlines()


def test_rewind_drops_what_lies_beyond_and_a_torn_line(tracker: Tracker, folder: Path) -> None:
    tracker.rewind(0)
    assert not (folder / "metrics.jsonl").exists()
    for nimg in (1000, 2000, 3000):
        tracker.log_scalars({"x": 1.0}, nimg)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"nimg": 2000, "ki')
    tracker.rewind(2000)
    tracker.log_scalars({"x": 2.0}, 3000)
    assert [(r["nimg"], r["x"]) for r in records(folder)] == [(1000, 1.0), (2000, 1.0), (3000, 2.0)]
    left = {p.name for p in folder.iterdir()} - {".outbox.lock"}  # which is there once something was delivered
    assert left == {"metrics.jsonl", "outbox.json", "outbox.jsonl"}


def test_what_is_repeated_comes_once(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    """Killed at 5.5 kimg, continued from a checkpoint at 4: what the first try sent stands, the rest is added."""
    first = Tracker(folder, uri)
    first.rewind(0)
    for nimg in (0, 4000):
        first.log_grid("fakes", nimg, picture(folder / f"{nimg}.png"))
    for nimg in (1000, 2000, 3000, 4000, 5000, 5500):
        first.log_scalars({"x": nimg / 1000, "speed": 1.0}, nimg)
    first.close()
    second = Tracker(folder, uri)
    second.rewind(4000)
    for nimg in (5000, 5500, 6000):
        second.log_scalars({"x": nimg / 1000, "speed": 2.0, "new": 1.0}, nimg)
    second.log_grid("fakes", 6000, picture(folder / "6000.png"))
    second.close()
    assert points(client, run_id, "x") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (5, 5.5), (6, 6.0)]
    assert [value for _, value in points(client, run_id, "speed")] == [1.0] * 6 + [2.0]
    assert [step for step, _ in points(client, run_id, "new")] == [5, 5, 6]
    assert [r["nimg"] for r in records(folder)] == [1000, 2000, 3000, 4000, 5000, 5500, 6000]
    assert [r["speed"] for r in records(folder)] == [1.0] * 4 + [2.0] * 3
    # Started over, as when it is killed before its first checkpoint.
    third = Tracker(folder, uri)
    third.rewind(0)
    third.log_grid("fakes", 0, picture(folder / "0.png"))
    third.log_scalars({"x": -1.0}, 1000)
    third.close()
    assert len(points(client, run_id, "x")) == 7
    assert len(images(client, run_id)) == 6


def everything(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """What MLflow has of a run."""
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


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "gen.onnx"
    export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), path, {})
    return path


def train_offline(folder: Path, uri: str, name: str, onnx_file: Path) -> str:
    """A training as a whole: interrupted, continued, and ended, without a server."""
    key = begin(folder, uri, offline=True)
    (folder / "best").mkdir()
    tracker = Tracker(folder, None)
    tracker.rewind(0)
    tracker.log_grid("fakes", 0, picture(folder / "0.png"))
    for nimg in range(1000, 30_000, 1000):
        tracker.log_scalars({f"x{i}": nimg + i for i in range(60)}, nimg)
    tracker.note("checkpoint", "could not be written", 29_000)
    tracker.close()
    end_run(folder, uri, "KILLED", offline=True)
    assert begin(folder, uri, offline=True, run_id=key, config=CONFIG | {"kimg": 31.0}) == key
    tracker = Tracker(folder, None)
    tracker.rewind(20_000)
    for nimg in range(21_000, 32_000, 1000):
        tracker.log_scalars({f"x{i}": nimg + i for i in range(60)}, nimg)
    tracker.log_grid("fakes", 31_000, picture(folder / "31.png"))
    tracker.note("resumed", "from 20 kimg", 20_000)
    tracker.close()
    onnx = Path(shutil.copy(onnx_file, folder / "best"))
    info = {"recipe": "tiny", "kimg": 31.0, "metric": {"name": "fid2k", "value": 3.0}, "dataset_digest": "dada"}
    tracker = Tracker(folder, None)
    tracker.log_model(name, onnx, info)
    end_run(folder, uri, "FINISHED", offline=True)
    return key


def test_offline_and_delivered_later(
    client: MlflowClient,
    uri: str,
    folder: Path,
    onnx_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as alone:
        alone.setattr("trainer.tracking.tracker.connect", None)
        alone.setattr("trainer.tracking.server.connect", None)
        key = train_offline(folder, uri, "offline", onnx_file)
        assert key.startswith("offline-")
        assert mlflow_run_id(folder) is None
        assert is_finished(folder)
    assert f"records wait in {folder}: `cattrain sync {folder}`" in capsys.readouterr().err

    synced = main(["sync", str(folder)])
    run_id = synced["mlflow_run_id"]
    assert synced == {"run_dir": str(folder), "mlflow_run_id": run_id, "delivered": 42}
    found = everything(client, run_id)
    assert found["runs"] == [run_id]
    opened, *_, ended = (record for record, _ in Journal(folder / "outbox.jsonl").read())
    assert found["status"] == ("FINISHED", opened["time"], ended["time"])
    assert found["params"]["kimg"] == "1.5"
    assert found["tags"]["resumed.kimg"] == "31.0"
    assert found["tags"]["catgan.run"] == key
    assert found["inputs"] == [MANIFEST.digest[:36]]
    for i in range(60):
        assert [(step, value) for step, value, _ in found["metrics"][f"x{i}"]] == [
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


def test_a_sync_that_is_cut_off_anywhere_delivers_nothing_twice(
    client: MlflowClient, uri: str, folder: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of request is carried out at least once without anybody hearing of it: the connection breaks."""
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
                sync(folder)
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
    (folder / "outbox.json").unlink()  # and all of it once more
    sync(folder)
    again = everything(client, run_id)
    assert mlflow_run_id(folder) == run_id
    assert again == found


def test_a_record_that_mlflow_refuses_does_not_keep_the_others_back(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = Outbox(folder)
    outbox.put({"kind": "artifact", "time": 0, "path": "gone.png", "folder": None})
    (folder / "broken.png").write_bytes(b"no picture")
    outbox.put({"kind": "grid", "time": 0, "nimg": 0, "key": "fakes", "path": "broken.png"})
    for n, name in enumerate(("good", "b?a=d", "good")):
        outbox.put({"kind": "scalars", "time": n, "nimg": n * 1000, "values": {name: 1.0}})
    tracker.close()
    assert points(client, run_id, "good") == [(0, 1.0), (2, 1.0)]
    assert outbox.left() == 0
    said = capsys.readouterr().err
    assert said.count("goes without") == 3
    for part in ("gone.png is not there", "cannot identify image file", "b?a=d"):
        assert part in said


def test_records_of_a_deleted_run_wait(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.delete_run(run_id)
    tracker.log_scalars({"x": 1.0}, 1000)
    tracker.close()
    assert "mlflow runs restore" in capsys.readouterr().err
    assert Outbox(folder).left() == 1
    client.restore_run(run_id)
    sync(folder)
    assert points(client, run_id, "x") == [(1, 1.0)]


def test_a_reopened_run_goes_on(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    first = Tracker(folder, uri)
    first.log_scalars({"x": 1.0}, 1000)
    first.close()
    end_run(folder, uri, "FAILED")
    assert begin(folder, uri, config=CONFIG | {"kimg": 3.0, "new": 1}, run_id=run_id) == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "first")
    assert run.data.params["kimg"] == "1.5"
    assert run.data.tags["resumed.kimg"] == "3.0"
    assert [key for key in run.data.tags if key.startswith("resumed.")] == ["resumed.kimg"]
    assert run.data.params["new"] == "1"
    assert len(run.inputs.dataset_inputs) == 1
    second = Tracker(folder, uri)
    second.log_scalars({"x": 2.0}, 2000)
    second.close()
    assert points(client, run_id, "x") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id).info.status == "RUNNING"
    end_run(folder, uri, "KILLED")
    assert client.get_run(run_id).info.status == "KILLED"


def test_a_run_whose_folder_has_no_outbox_is_reopened(
    client: MlflowClient, uri: str, run_id: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    assert begin(tmp_path / "other", uri, run_id=run_id) == run_id
    assert mlflow_run_id(tmp_path / "other") == run_id


def test_a_start_that_was_cut_off_is_continued(client: MlflowClient, uri: str, folder: Path, run_id: str) -> None:
    assert begin(folder, uri) == run_id
    (folder / "outbox.json").unlink()
    assert begin(folder, uri) == run_id


def test_an_unknown_run_is_the_users_mistake(uri: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no run 0123.*tracking URI"):
        begin(folder, uri, run_id="0123")


def test_a_deleted_run_is_the_users_mistake(client: MlflowClient, uri: str, run_id: str, folder: Path) -> None:
    client.delete_run(run_id)
    with pytest.raises(UserError, match="mlflow runs restore"):
        begin(folder, uri, run_id=run_id)


def test_sync_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"outbox\.jsonl"):
        main(["sync", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_does_not_answer_ends_a_start_at_once(
    hangs: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.server._PROBE_SECONDS", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        if hangs:
            closed.listen()
        port = closed.getsockname()[1]
        reason = "timed out" if hangs else "refused"
        with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port} .*{reason}.*--track\.offline") as caught:
            begin(folder, f"http://me:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)
    assert not folder.exists(), "nothing began"


def test_a_training_ends_well_without_the_server(
    folder: Path, tmp_path: Path, client: MlflowClient, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://me:secret@127.0.0.1:{closed.getsockname()[1]}"
        begin(folder, away, offline=True)  # as if it had answered then
        tracker = Tracker(folder, away)
        tracker.log_scalars({"x": 1.0}, 1000)
        tracker.close()
        end_run(folder, away, "FINISHED")
        said = capsys.readouterr().err
        assert "warning: MLflow at http://127" in said
        assert f"3 records wait in {folder}: `cattrain sync {folder}`" in said
        with pytest.raises(UserError, match=r"does not answer.*3 of 3 records are left"):
            main(["sync", str(folder)])
    assert "secret" not in said
    for path in folder.iterdir():
        assert "secret" not in path.read_text(), path
    moved = folder.rename(tmp_path / "moved")
    run_id = main(["sync", str(moved), "--uri", uri])["mlflow_run_id"]
    assert points(client, run_id, "x") == [(1, 1.0)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_retries_are_bounded(client: MlflowClient) -> None:
    """MLflow alone would try for minutes."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() <= 3
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() <= 30


def test_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = resolve_uri(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="cannot write the MLflow database"):
        begin(tmp_path / "run", uri)


def test_a_worker_without_the_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not on this machine"):
        Tracker(tmp_path, f"sqlite:///{tmp_path}/elsewhere.db")
    assert not (tmp_path / "elsewhere.db").exists()


def test_which_uri_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert resolve_uri("sqlite:///mine.db", Path("out")) == f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri(None, Path("out")) == "http://127.0.0.1:5000"
    assert resolve_uri("sqlite:////mine.db", Path("out")) == "sqlite:////mine.db"
    for dead in ("file:./mlruns", "./mlruns", "mlruns"):
        with pytest.raises(UserError, match="file store"):
            resolve_uri(dead, Path("out"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_is_the_checkouts_own(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert "git.dirty" not in _code_version(tmp_path)
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    tags = _code_version(tmp_path)
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "inner" / "file").write_text("2")
    assert _code_version(tmp_path)["git.dirty"] == "true"
    # Installed below somebody else's repository, its commit says nothing about this code.
    assert "mlflow.source.git.commit" not in _code_version(tmp_path / "inner")
