"""What workers on Ray and the driver tell each other: a stop request one way, messages and progress the other.

Ray prints what workers write to stderr, with their process ids before each line. That remains for what libraries and
reader processes write. A worker's own messages are sent to the driver instead, which shows them as those of a training
in its own process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from catgan.command import lines_to, say
from trainer.tracking.progress import Progress

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 10.0


def create_link() -> Any:
    """Create an actor on this machine that the driver sets to end the training, that rank 0 reads at each tick, and
    that keeps what workers tell the driver. It exists as long as this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Link:  # defined here, so that its process does not import this module, and with it PyTorch
        def __init__(self) -> None:
            self._stop = False
            self._told: list[str | dict[str, Any]] = []

        def request_stop(self) -> None:
            self._stop = True

        def is_stop_requested(self) -> bool:
            return self._stop

        def tell(self, item: str | dict[str, Any]) -> None:
            self._told.append(item)

        def take(self) -> list[str | dict[str, Any]]:
            told, self._told = self._told, []
            return told

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Link).options(num_cpus=0, scheduling_strategy=here).remote()


@contextlib.contextmanager
def telling(link: Any, rank: int) -> Iterator[Callable[[Progress], None]]:
    """In the worker ``rank``: hand what ``say`` prints inside the block to the driver, that of ranks other than 0 with
    the rank before it. Yields a function that does the same with the progress. Neither waits for the driver."""
    import ray
    from ray.exceptions import RayError

    name = f"worker {rank}: " if rank else ""
    try:
        with lines_to(lambda line: link.tell.remote(name + line)):
            yield lambda progress: link.tell.remote(asdict(progress))
    finally:
        with contextlib.suppress(RayError):
            ray.get(link.is_stop_requested.remote())  # all that was told before has arrived


@contextlib.contextmanager
def listening(link: Any, show: Callable[[Progress], None]) -> Iterator[None]:
    """In the driver: print the messages of workers inside the block, and ``show`` the progress."""
    import ray
    from ray.exceptions import RayError

    closing = threading.Event()

    def listen() -> None:
        is_last = False
        with contextlib.suppress(RayError):  # without the link, the training ends too
            while not is_last:
                is_last = closing.wait(_POLL_SECONDS)
                for item in ray.get(link.take.remote()):
                    with contextlib.suppress(OSError):  # of a terminal that is gone; the actor must still be emptied
                        if isinstance(item, str):
                            say(item)
                        else:
                            show(Progress(**item))

    # A daemon, so that a cluster that does not answer cannot keep the process alive.
    thread = threading.Thread(target=listen, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(_CLOSE_SECONDS)
