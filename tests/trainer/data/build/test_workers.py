from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from catgan.machine import cores
from trainer.data.build.workers import workers


def test_work_is_done_elsewhere() -> None:
    with workers(2, "math") as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
        assert pool.submit(os.getpid).result() != os.getpid()
    assert multiprocessing.active_children() == []


def leave_by(error: type[BaseException]) -> None:
    with workers(1, "math") as pool:
        assert pool.submit(abs, -1).result() == 1
        for _ in range(3):
            pool.submit(time.sleep, 3600)
        raise error


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_does_not_wait_for_what_is_running(error: type[BaseException]) -> None:
    with pytest.raises(error):
        leave_by(error)
    assert multiprocessing.active_children() == []


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
