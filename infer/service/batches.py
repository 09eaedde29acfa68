"""Computes what waits in batches, taking turns, so that one image does not wait for a whole walk."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from catgan.machine import cores
from infer.service.metrics import Metrics
from infer.session import BATCH, CPU, Generator

# Images per call on CPUs, per core: enough that no core waits for the other, and few enough that a request that comes
# in meanwhile starts soon. Images do not depend on it.
_PER_CORE = 4


@dataclass(eq=False)
class _Job:
    """Images that belong together. ``begun`` of the ``n`` images are computed or under way."""

    latents: Callable[[], np.ndarray]
    n: int
    psi: float
    labels: np.ndarray
    done: asyncio.Future[np.ndarray]
    begun: int = 0
    z: np.ndarray | None = None
    pixels: np.ndarray | None = None


class _Part(NamedTuple):
    """The images from ``start`` to ``stop`` of a job."""

    job: _Job
    start: int
    stop: int


class Batches:
    """A queue of jobs in front of one generator. Not thread-safe: for the event loop that runs ``run``.

    Attributes:
        seconds_per_image: of the latest batches, 0 before the first one.
    """

    def __init__(self, generator: Generator, metrics: Metrics) -> None:
        self._generator, self._metrics = generator, metrics
        self._most = _PER_CORE * cores() if generator.provider == CPU else BATCH[generator.provider]
        self._waiting: deque[_Job] = deque()
        self._some = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "generator")
        self.seconds_per_image = 0.0

    async def compute(
        self, latents: Callable[[], np.ndarray], n: int, psi: float = 1.0, labels: np.ndarray | None = None
    ) -> np.ndarray:
        """The images uint8 ``[n, size, size, 3]`` of ``latents()``, float32 ``[n, z_dim]``, which another thread calls,
        truncated by ``psi``, of the classes ``labels``, int64 ``[n]`` (all 0 if not given).

        If the caller is cancelled, what has not begun is not computed.

        Raises:
            UserError: the generator failed.
        """
        labels = np.zeros(n, np.int64) if labels is None else labels
        job = _Job(latents, n, psi, labels, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._some.set()
        return await job.done

    async def run(self) -> None:
        """Compute until cancelled."""
        try:
            while True:
                await self._some.wait()
                if parts := self._take():
                    await self._compute(parts)
                else:
                    self._some.clear()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _take(self) -> list[_Part]:
        """The next batch: from each job in turn as many images as there is room for; the rest goes to the end."""
        parts: list[_Part] = []
        room = self._most
        while room and self._waiting:
            job = self._waiting.popleft()
            if job.done.done():  # its clients are gone, or it failed
                continue
            part = _Part(job, job.begun, min(job.n, job.begun + room))
            parts.append(part)
            room -= part.stop - part.start
            job.begun = part.stop
            if job.begun < job.n:
                self._waiting.append(job)
        return parts

    async def _compute(self, parts: Sequence[_Part]) -> None:
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._generate, parts)
        await asyncio.wait({work})
        error = work.exception()
        if error is not None and len(parts) > 1:  # which of them is to blame?
            for part in parts:
                await self._compute([part])
            return
        for job, _, stop in parts:
            if job.done.done():
                continue
            if error is not None:
                job.done.set_exception(error)
            elif stop == job.n:
                assert job.pixels is not None
                job.done.set_result(job.pixels)

    def _generate(self, parts: Sequence[_Part]) -> None:
        """Compute ``parts`` in one call. Runs in the thread."""
        began = time.perf_counter()
        z = []
        for job, start, stop in parts:
            if job.z is None:
                job.z = job.latents()
            z.append(job.z[start:stop])
        psis = [np.full(stop - start, job.psi, np.float32) for job, start, stop in parts]
        labels = [job.labels[start:stop] for job, start, stop in parts]
        images = self._generator(np.concatenate(z), np.concatenate(psis), label=np.concatenate(labels))
        at = 0
        for job, start, stop in parts:
            if job.pixels is None:
                job.pixels = np.empty((job.n, *images.shape[1:]), np.uint8)
            job.pixels[start:stop] = images[at : at + stop - start]
            at += stop - start
        seconds = time.perf_counter() - began
        latest = seconds / len(images)
        self.seconds_per_image += (latest - self.seconds_per_image) * (0.2 if self.seconds_per_image else 1.0)
        self._metrics.images.inc(len(images))
        self._metrics.batches.observe(len(images))
        self._metrics.batch_seconds.inc(seconds)
