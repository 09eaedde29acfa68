"""A training's config and data, and short forms of the calls that record it and look at it in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from PIL import Image

from catgan.dataset import Manifest, Shard, Split
from export.registry import register
from trainer.tracking.tracker import Status, Tracker, end_run, open_run

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


def begin(folder: Path, uri: str, experiment: str = "catgan", **options: Any) -> str:
    return open_run(folder, uri, experiment, **{"config": CONFIG, "manifest": MANIFEST, "register": register} | options)


def track(folder: Path, uri: str) -> Tracker:
    """A tracker that delivers to ``uri``."""
    return Tracker(folder, uri, register=register)


def end(folder: Path, uri: str, status: Status, offline: bool = False) -> None:
    end_run(folder, uri, status, offline, register=register)


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    """Step and value of each point of a metric."""
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def images(client: MlflowClient, run_id: str) -> list[str]:
    return [Path(file.path).name for file in client.list_artifacts(run_id, "images")]


def events(client: MlflowClient, run_id: str) -> list[str]:
    return Path(client.download_artifacts(run_id, "events.txt")).read_text().splitlines()


def make_image(path: Path, colour: int = 0) -> Path:
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(path)
    return path
