"""What all tests share: isolation from the machine they run on, data, and the order in which files run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run in several processes, and so do trainings in tests: more threads would only wait for each other. Set before
# PyTorch is imported, and inherited by every command.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, and so would every command be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take longest, so that they start first and no process is left with one of them at the end.
_LONGEST_FIRST = (
    "trainer/test_loop.py",
    "trainer/launch/test_run.py",
    "trainer/tracking/test_away.py",
    "trainer/launch/test_failures.py",
    "trainer/launch/test_buckets.py",
    "trainer/test_step.py",
    "export/test_sources.py",
    "trainer/tracking/test_delivery.py",
    "benchmarks/test_scripts.py",
    "infer/test_fuzz.py",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a file run in one process, since they share fixtures, and so do all that start a Ray cluster: two would
    not leave each other a core."""
    root = Path(__file__).parent
    order = {str(root / name): i for i, name in enumerate(_LONGEST_FIRST)}
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.relative_to(root).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (not item.get_closest_marker("ray"), order.get(str(item.path), len(order))))


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
