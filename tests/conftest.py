"""What all tests share: isolation from the machine they run on, data, and the order in which files run."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Tests run in several processes, and so do trainings in tests: more threads would only wait for each other. Set before
# PyTorch is imported, and inherited by every command.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, and so would every command be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent

# Files that take longest start first, so that at the end no process waits for another.
_LONGEST_FIRST = (
    "cluster/test_faults.py",
    "cluster/test_job.py",
    "trainer/test_loop.py",
    "trainer/tracking/test_away.py",
    "trainer/launch/test_failures.py",
    "trainer/test_step.py",
    "export/test_sources.py",
    "infer/test_fuzz.py",
)


class ByFile(LoadScopeScheduling):
    """Runs the tests of a file in one process, since they share fixtures, and those of all files that start Ray
    clusters too: two clusters would not leave each other a core."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _starts_ray(file) else file


@functools.cache
def _starts_ray(file: str) -> bool:
    return "pytest.mark.ray" in (ROOT.parent / file).read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {str(ROOT / name): i for i, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session, which its processes share: exporting a metric network takes seconds."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patch:
        (shared / "cache").mkdir(exist_ok=True)
        patch.setenv("CATGAN_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_shared_memory() -> Iterator[None]:
    """Decoded images are shared by all processes with the same data set, and tests damage theirs."""
    from trainer.distributed import shared_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shared_memory, "PREFIX", f"{shared_memory.PREFIX}{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-"
        )
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 96 drawn cats at 32x32, made once. Read it only."""
    # Imported here so that tests which need no data need no trainer either.
    from trainer.data.cli import main

    folder = tmp_path_factory.mktemp("shards") / "cats"
    made = main(["synth", str(folder), "--num", "96", "--size", "32", "--seed", "0"])
    assert made["kept"] == 96
    return folder
