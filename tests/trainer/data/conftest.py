"""Data sets for tests of reading."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from catgan.dataset import Manifest
from tests.trainer.data.numbered import write_numbered


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The numbered data set. Read it only."""
    return write_numbered(tmp_path_factory.mktemp("numbered") / "shards")


@pytest.fixture
def copy(manifest: Manifest, tmp_path: Path) -> Manifest:
    """A copy to damage; half of its images may be unusable."""
    return replace(Manifest.load(shutil.copytree(manifest.root, tmp_path / "copy")), max_broken=0.5)
