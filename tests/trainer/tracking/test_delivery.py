"""How records look in MLflow: descriptions, groups, images, and records that it rejects."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from catgan.dataset import Manifest, Shard, Split
from export.registry import register
from infer.files import encode
from infer.origin import inspect
from infer.provenance import SOURCE_TYPE, in_training
from tests.trainer.tracking.runs import MANIFEST, begin, images, make_image, points
from trainer.tracking.description import code_version
from trainer.tracking.outbox import Outbox
from trainer.tracking.tracker import Tracker, sync


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


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert "git.dirty" not in code_version(tmp_path)
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    tags = code_version(tmp_path)
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (git("rev-parse", "HEAD"), "false")
    (tmp_path / "inner" / "file").write_text("2")
    assert code_version(tmp_path)["git.dirty"] == "true"
    # Installed inside another repository, whose commit says nothing about this code.
    assert "mlflow.source.git.commit" not in code_version(tmp_path / "inner")


def test_trainings_on_the_same_data_are_children_of_one_run(uri: str, client: MlflowClient, tmp_path: Path) -> None:
    def opened(name: str, manifest: Manifest, experiment: str = "comparing", run_id: str | None = None) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return begin(tmp_path / name, uri, experiment, manifest=manifest, run_id=run_id)

    def parent(run_id: str) -> str | None:
        return client.get_run(run_id).data.tags.get("mlflow.parentRunId")

    other = replace(MANIFEST, splits={"train": Split((Shard("train-000000.tar", 90, "cd" * 32, 1),)), "val": Split(())})
    first = opened("first", MANIFEST)
    alone, elsewhere = opened("alone", other), opened("elsewhere", MANIFEST, "another")
    assert [parent(run_id) for run_id in (first, alone, elsewhere)] == [None] * 3
    opened("first", MANIFEST, run_id=first)
    assert parent(first) is None, "a training that is continued is not a second one"

    second = opened("second", MANIFEST)
    both = parent(first)
    assert both is not None
    group = client.get_run(both)
    assert (group.info.run_name, group.info.status) == (f"cats64 {MANIFEST.digest[:8]}", "FINISHED")
    assert group.inputs.dataset_inputs[0].dataset.digest == MANIFEST.digest[:36]
    client.set_tag(second, "mlflow.parentRunId", first)  # as a user may do
    third = opened("third", MANIFEST)
    opened("second", MANIFEST, run_id=second)
    assert [parent(run_id) for run_id in (first, second, third)] == [both, first, both]
    assert parent(alone) is None
    experiment = client.get_experiment_by_name("comparing")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 5


def test_images_are_named_as_mlflow_names_them(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path
) -> None:
    """Its page shows no image otherwise."""
    tracker.log_grid("fakes", 2000, make_image(folder / "fakes.png"))
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


def test_copies_of_generated_images_say_so(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, tmp_path: Path
) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    for kimg, (name, xmp) in enumerate((("fakes", in_training()), ("photos", None))):
        (folder / f"{name}.png").write_bytes(encode(pixels, ".png", xmp))
        tracker.log_grid(name, 1000 * kimg, folder / f"{name}.png")
    tracker.close()
    copies = [
        Path(client.download_artifacts(run_id, f"images/{name}", str(tmp_path))) for name in images(client, run_id)
    ]
    assert len(copies) == 4  # each as PNG and as WebP
    for record in inspect(list(map(str, copies)))["files"]:
        is_generated = Path(record["file"]).name.startswith("fakes")
        assert record["digital_source_type"] == (SOURCE_TYPE if is_generated else None)


def test_the_runs_page_shows_the_latest_grid_and_the_animation(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path
) -> None:
    def link(text: str, path: str) -> str:
        return f"![{text}](get-artifact?path=samples%2F{path}&run_uuid={run_id})"

    tracker.log_grid("fakes", 1000, make_image(folder / "first.png"))
    tracker.log_grid("fakes", 2000, make_image(folder / "second.png"))
    tracker.log_artifact(make_image(folder / "progress.gif"), "samples")
    tracker.close()
    both = f"{link('fakes at 2 kimg', 'second.png')} {link('the whole training', 'progress.gif')}"
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == both


def test_a_users_description_is_kept(client: MlflowClient, tracker: Tracker, run_id: str, folder: Path) -> None:
    client.set_tag(run_id, "mlflow.note.content", "Mine. ![a](get-artifact?path=a.png)")
    tracker.log_grid("fakes", 1000, make_image(folder / "first.png"))
    tracker.close()
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "Mine. ![a](get-artifact?path=a.png)"


def test_a_rejected_record_is_skipped_and_does_not_block_others(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = Outbox(folder)
    outbox.put({"kind": "artifact", "time": 0, "path": "gone.png", "folder": None})
    (folder / "broken.png").write_bytes(b"no image")
    outbox.put({"kind": "grid", "time": 0, "nimg": 0, "key": "fakes", "path": "broken.png"})
    lost = bytearray(encode(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8), ".png"))
    lost[65536:69632] = bytes(4096)  # Pillow raises a SyntaxError
    (folder / "lost.png").write_bytes(lost)
    outbox.put({"kind": "grid", "time": 0, "nimg": 0, "key": "fakes", "path": "lost.png"})
    for n, name in enumerate(("good", "b?a=d", "good")):
        outbox.put({"kind": "scalars", "time": n, "nimg": n * 1000, "values": {name: 1.0}})
    tracker.close()
    assert points(client, run_id, "good") == [(0, 1.0), (2, 1.0)]
    assert outbox.num_undelivered() == 0
    output = capsys.readouterr().err
    assert output.count("skipped a record of kind") == 4
    for part in ("gone.png does not exist", "cannot identify image file", "lost.png is not an image", "b?a=d"):
        assert part in output


def test_records_of_a_deleted_run_stay_in_the_outbox(
    client: MlflowClient, tracker: Tracker, run_id: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.delete_run(run_id)
    tracker.log_scalars({"x": 1.0}, 1000)
    tracker.close()
    assert "mlflow runs restore" in capsys.readouterr().err
    assert Outbox(folder).num_undelivered() == 1
    client.restore_run(run_id)
    sync(folder, register=register)
    assert points(client, run_id, "x") == [(1, 1.0)]
