"""Answers with images: from the cache, from an equal request that is under way, or newly computed."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event

from catgan.machine import cores
from infer.service.batches import Batches
from infer.service.encoding import encode_answer, points
from infer.service.metrics import Metrics
from infer.service.model import Model
from infer.service.parameters import WALK, ImageRequest

MAX_REQUESTS = 64  # that wait or are computed
MAX_BYTES = 2**28  # of their pixels; a request is accepted without regard to this if no other is under way
CACHE_BYTES = 2**26
MAX_RETRY_AFTER = 60  # seconds


class QueueFull(Exception):
    """No request can be accepted now. ``retry_after`` is an estimate in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"{MAX_REQUESTS} requests or {MAX_BYTES >> 20} MiB of images are waiting; try again later")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Flight:
    """An answer that is being computed for ``clients`` equal requests."""

    request: ImageRequest
    task: asyncio.Task[bytes]
    clients: int = 0


class Answers:
    """Computes and caches answers. For one event loop, which also runs ``batches.run()``."""

    def __init__(self, model: Model, batches: Batches, metrics: Metrics) -> None:
        self._model, self._batches, self._metrics = model, batches, metrics
        self._flights: dict[str, _Flight] = {}
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached = self._images = 0
        self._encoders = ThreadPoolExecutor(cores(), "encoder")
        self._walks = ThreadPoolExecutor(1, "walks")  # a GIF can take seconds, which images should not wait for

    def tag(self, request: ImageRequest) -> str:
        """The entity tag of the answer, with its quotes: a digest of everything that its bytes depend on."""
        return f'"{hashlib.sha256(f"{self._model.fingerprint} {request!r}".encode()).hexdigest()[:32]}"'

    async def get(self, request: ImageRequest, gone: asyncio.Task[None]) -> bytes | None:
        """The bytes for ``request``, or None if ``gone`` ended first. Then they are no longer computed, unless another
        client waits for the same.

        Raises:
            QueueFull: too much is waiting.
            UserError: the generator failed.
        """
        tag = self.tag(request)
        if (found := self._cache.get(tag)) is not None:
            self._cache.move_to_end(tag)
            self._count("cache")
            return found
        flight = self._flights.get(tag)
        if flight is None:
            flight = self._start(tag, request)
            source = "computed"
        else:
            source = "shared"
        flight.clients += 1
        try:
            await asyncio.wait({flight.task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            flight.clients -= 1
            if not flight.clients and not flight.task.done():
                flight.task.cancel()
                self._land(tag, flight)
        self._count(source if flight.task.done() else "dropped")
        return flight.task.result() if flight.task.done() else None

    def close(self) -> None:
        """Wait for the files that are being encoded."""
        for pool in (self._encoders, self._walks):
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, tag: str, request: ImageRequest) -> _Flight:
        waiting = (self._images + request.images) * 3 * self._model.size**2
        if len(self._flights) >= MAX_REQUESTS or (self._flights and waiting > MAX_BYTES):
            self._count("refused")
            seconds = math.ceil(self._images * self._batches.seconds_per_image)
            raise QueueFull(max(1, min(seconds, MAX_RETRY_AFTER)))
        flight = self._flights[tag] = _Flight(request, asyncio.create_task(self._make(request)))
        flight.task.add_done_callback(lambda _: self._land(tag, flight))
        self._count_waiting(request.images)
        return flight

    def _land(self, tag: str, flight: _Flight) -> None:
        """Remove a flight that is over, and cache its answer."""
        if self._flights.get(tag) is not flight:  # done before
            return
        del self._flights[tag]
        self._count_waiting(-flight.request.images)
        if flight.task.done() and not flight.task.cancelled() and flight.task.exception() is None:
            self._keep(tag, flight.task.result())

    async def _make(self, request: ImageRequest) -> bytes:
        pixels = await self._batches.compute(partial(points, request, self._model.z_dim), request.images)
        pool = self._walks if request.path == WALK else self._encoders
        cancelled = Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, encode_answer, request, pixels, cancelled)
        finally:
            cancelled.set()

    def _keep(self, tag: str, content: bytes) -> None:
        if len(content) > CACHE_BYTES // 4:
            return
        self._cache[tag] = content
        self._cached += len(content)
        while self._cached > CACHE_BYTES:
            self._cached -= len(self._cache.popitem(last=False)[1])
        self._metrics.cache_bytes.set(self._cached)

    def _count(self, source: str) -> None:
        self._metrics.answers.labels(source).inc()

    def _count_waiting(self, images: int) -> None:
        self._images += images
        self._metrics.queue.set(len(self._flights))
        self._metrics.queue_images.set(self._images)
