"""Sums over ranks in shared memory: the same bits everywhere, no value lost, no rank waited for that is dead."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer import shm
from trainer.collective import all_sum
from trainer.shared import CHUNK, SharedSums, shared_sums


def _start(rank: int, port: int, world_size: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    dist.init_process_group("gloo", address, rank=rank, world_size=world_size, timeout=patience)
    work(rank, *arguments)
    dist.destroy_process_group()


def ranks(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(rank, ...)`` in so many processes of one process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start, (port, world_size, work, arguments), world_size)


def mine(rank: int, turn: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + turn))


def _sum(rank: int, world_size: int) -> None:
    sums = shared_sums()
    assert isinstance(sums, SharedSums)
    assert shared_sums() is sums
    assert not list(shm.FOLDER.glob(f"{shm.PREFIX}sums-*")) or rank  # rank 0 has removed it
    for turn in range(300):
        size = (1, 1000, CHUNK, 2 * CHUNK + 1)[turn % 4 if turn < 40 else turn % 2]
        if (turn + rank) % 50 == 0:
            time.sleep(0.01)  # the others get beyond their looks without a pause
        x = mine(rank, turn, size)
        expected = torch.stack([mine(r, turn, size) for r in range(world_size)]).sum(0)
        assert torch.equal(sums.add(x), expected), turn


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum(world_size: int):
    before = set(shm.FOLDER.iterdir())
    ranks(world_size, _sum, world_size)
    assert not [path for path in set(shm.FOLDER.iterdir()) - before if "sums-" in path.name]


def _sum_otherwise(rank: int, elsewhere: str) -> None:
    x = mine(rank, 0, 10).reshape(5, 2).T
    expected = (mine(0, 0, 10) + mine(1, 0, 10)).reshape(5, 2).T
    assert torch.equal(all_sum(x), expected)
    assert torch.equal(all_sum(x.double()), mine(0, 0, 10).double().add(mine(1, 0, 10).double()).reshape(5, 2).T)
    if elsewhere:
        assert shared_sums() is None


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
    before = set(shm.FOLDER.iterdir())
    ranks(2, work)
    assert not [path for path in set(shm.FOLDER.iterdir()) - before if "sums-" in path.name]


def _lose(rank: int) -> None:
    sums = shared_sums()
    assert sums is not None
    sums.add(torch.ones(3))
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 has ended"):
        sums.add(torch.ones(3))
    os._exit(7)  # without saying goodbye to a process group that is no longer whole


def test_a_killed_rank_is_noticed():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [mp.get_context("spawn").Process(target=_start, args=(rank, port, 2, _lose, ())) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [7, -signal.SIGKILL]
