"""What tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell starts background jobs with SIGINT ignored, and so would every command be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 96 drawn cats at 32x32, made once. Read it only."""
    # Imported here so that tests which need no data need no trainer either.
    from trainer.data.cli import main

    folder = tmp_path_factory.mktemp("shards") / "cats"
    made = main(["synth", str(folder), "--num", "96", "--size", "32", "--seed", "0"])
    assert made["kept"] == 96
    return folder
