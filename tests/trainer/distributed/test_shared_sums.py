"""Sums over ranks in shared memory: the same bits everywhere, no value lost, no rank waited for that is dead."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.distributed import shared_memory as shm
from trainer.distributed.collectives import sum_over_ranks
from trainer.distributed.shared_sums import CHUNK, SharedSums, shared_sums

pytestmark = pytest.mark.slow

TEST_PREFIX = f"catgan-{os.getuid()}-test-"


def _start(rank: int, port: int, world_size: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    shm.PREFIX = f"{TEST_PREFIX}{os.getppid()}-"  # in this process only
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    dist.init_process_group("gloo", address, rank=rank, world_size=world_size, timeout=patience)
    work(rank, *arguments)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(rank, ...)`` in so many processes of one process group."""
    mp.spawn(_start, (free_port(), world_size, work, arguments), world_size)


def mine(rank: int, turn: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + turn))


def _sum(rank: int, world_size: int) -> None:
    sums = shared_sums()
    assert isinstance(sums, SharedSums)
    assert shared_sums() is sums
    for turn in range(300):
        size = (1, 1000, CHUNK, 2 * CHUNK + 1)[turn % 4 if turn < 40 else turn % 2]
        if (turn + rank) % 50 == 0:
            time.sleep(0.01)  # the others get beyond their looks without a pause
        x = mine(rank, turn, size)
        expected = sum((mine(r, turn, size) for r in range(1, world_size)), mine(0, turn, size))
        assert torch.equal(sums.add(x), expected), turn


@pytest.mark.parametrize("world_size", [2, 5])
def test_every_rank_gets_the_sum(world_size: int):
    ranks(world_size, _sum, world_size)
    assert not list(shm.FOLDER.glob(f"{TEST_PREFIX}{os.getpid()}-*"))


def _sum_otherwise(rank: int, elsewhere: str) -> None:
    x = mine(rank, 0, 10).reshape(5, 2).T
    expected = (mine(0, 0, 10) + mine(1, 0, 10)).reshape(5, 2).T
    assert torch.equal(sum_over_ranks(x), expected)
    assert torch.equal(sum_over_ranks(x.double()), mine(0, 0, 10).double().add(mine(1, 0, 10).double()).reshape(5, 2).T)
    assert (shared_sums() is None) == bool(elsewhere)


def _on_two_machines(rank: int) -> None:
    if rank:
        os_open = os.open

        def blind(path: Any, *arguments: Any, **named: Any) -> int:
            if "sums-" in str(path):
                raise FileNotFoundError(path)
            return os_open(path, *arguments, **named)

        os.open = blind
    _sum_otherwise(rank, "elsewhere")


def _without_room(rank: int) -> None:
    def full(file: int, length: int) -> None:
        raise OSError("no space")

    shm.reserve = full
    _sum_otherwise(rank, "elsewhere")


def test_any_shape_and_type_is_summed():
    ranks(2, _sum_otherwise, "")


@pytest.mark.parametrize("work", [_on_two_machines, _without_room])
def test_ranks_that_share_no_memory_sum_over_gloo(work: Callable[..., None]):
    ranks(2, work)
    assert not list(shm.FOLDER.glob(f"{TEST_PREFIX}{os.getpid()}-*"))


def _lose(rank: int, folder: str) -> None:
    sums = shared_sums()
    assert sums is not None
    sums.add(torch.ones(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 has ended"):
        sums.add(torch.ones(3))
    Path(folder, str(rank)).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # a survivor that notices lives on, and must not keep the other one from noticing
    # Without saying goodbye to a process group that is no longer whole.
    os._exit(7 if time.monotonic() < deadline else 8)


def test_a_killed_rank_is_noticed_by_all_others(tmp_path: Path):
    port = free_port()
    spawn = mp.get_context("spawn").Process
    all_ranks = [spawn(target=_start, args=(r, port, 3, _lose, (str(tmp_path),)), daemon=True) for r in range(3)]
    for process in all_ranks:
        process.start()
    for process in all_ranks:
        process.join(120)
    assert [process.exitcode for process in all_ranks] == [7, -signal.SIGKILL, 7]
