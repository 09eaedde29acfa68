from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from catgan.machine import cores
from trainer.data.build.workers import map_ordered, worker_processes, worker_threads


def test_work_runs_in_other_processes() -> None:
    with worker_processes(2, "math") as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
        assert pool.submit(os.getpid).result() != os.getpid()
    assert multiprocessing.active_children() == []


def test_processes_work_in_a_tmpdir_that_is_too_long_for_sockets(tmp_path: Path):
    """As clusters give jobs; a process of its own, since the fork server starts once in each."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "from trainer.data.build.workers import worker_processes\n"
        "if __name__ == '__main__':\n"
        "    with worker_processes(1, 'math') as pool:\n"
        "        print(pool.submit(abs, -1).result())\n"
    )
    env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1\n", done.stderr


def leave_block_with(error: type[BaseException]) -> None:
    with worker_processes(1, "math") as pool:
        assert pool.submit(abs, -1).result() == 1
        for _ in range(3):
            pool.submit(time.sleep, 3600)
        raise error


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_error_does_not_wait_for_running_processes(error: type[BaseException]) -> None:
    with pytest.raises(error):
        leave_block_with(error)
    assert multiprocessing.active_children() == []


def test_queued_work_of_threads_is_cancelled() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.05)
        done.append(number)

    with worker_threads(1) as pool:
        for number in range(100):
            pool.submit(work, number)
    assert len(done) < 3


@pytest.mark.parametrize("threads", [0, 3])
def test_map_ordered_gives_results_in_order_and_takes_few_items_ahead(threads: int) -> None:
    taken: list[int] = []
    first_may_end = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    def square(number: int) -> int:
        if number == 0 and threads:
            assert first_may_end.wait(10)
        elif number == 2:
            first_may_end.set()
        return number * number

    with worker_threads(max(threads, 1)) as pool:
        results = map_ordered(square, items(), pool if threads else None, 3)
        assert next(results) == 0
        assert len(taken) == (3 if threads else 1)
        assert list(results) == [number * number for number in range(1, 10)]


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


def _send(size: int) -> bytes:
    return bytes(size)


@pytest.mark.timeout(60)
def test_a_process_that_ends_while_it_sends_a_result_does_not_block_the_end() -> None:
    """The moments spread over the time that the result takes: without the pool's end of the pipe closed, one of them
    blocks."""
    for tenths in range(1, 11):
        with worker_processes(1, __name__) as pool:
            assert pool.submit(_send, 0).result() == b""
            large = pool.submit(_send, 200 << 20)
            time.sleep(0.02 * tenths)
        assert large.done()
