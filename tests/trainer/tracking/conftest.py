"""One SQLite database for all tests in this folder, since creating one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from export.generator import export_onnx
from tests.trainer.tracking.runs import begin, track
from trainer.config import ModelConfig
from trainer.models import build_generator
from trainer.tracking.server import connect, resolve_uri
from trainer.tracking.tracker import Tracker


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri(None, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="session")
def client(uri: str) -> MlflowClient:
    return connect(uri)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "gen.onnx"
    export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), path, {})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    return folder


@pytest.fixture
def run_id(uri: str, folder: Path) -> str:
    return begin(folder, uri)


@pytest.fixture
def tracker(uri: str, run_id: str, folder: Path) -> Iterator[Tracker]:
    tracker = track(folder, uri)
    yield tracker
    tracker.close()
