"""Answers with images: from the cache, from an equal request that is under way, or newly computed."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event

from catgan.machine import cores
from infer.service.batches import Batches
from infer.service.encoding import encode_answer, labels, origin, points
from infer.service.metrics import Metrics
from infer.service.model import Model
from infer.service.parameters import WALK, ImageRequest

MAX_REQUESTS = 64  # that wait or are computed
MAX_BYTES = 2**28  # of their pixels and of answers that are being sent; a request that is alone may exceed it
CACHE_BYTES = 2**26
MAX_RETRY_AFTER = 60  # seconds


class QueueFull(Exception):
    """No request can be accepted now. ``retry_after`` is an estimate in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            f"{MAX_REQUESTS} requests or {MAX_BYTES >> 20} MiB of images are waiting or being sent; try again"
        )
        self.retry_after = retry_after


@dataclass(eq=False)
class _Pending:
    """An answer that is being computed for ``clients`` equal requests."""

    request: ImageRequest
    task: asyncio.Task[bytes]
    clients: int = 0


class Answers:
    """Computes and caches answers. For one event loop, which also runs ``batches.run()``."""

    def __init__(self, model: Model, batches: Batches, metrics: Metrics) -> None:
        self._model, self._batches, self._metrics = model, batches, metrics
        self._fingerprint = model.fingerprint
        self._pending: dict[str, _Pending] = {}
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached = self._images = self._sending = 0
        self._encoders = ThreadPoolExecutor(cores(), "encoder")
        self._walks = ThreadPoolExecutor(1, "walks")  # a GIF can take seconds, which images should not wait for

    def tag(self, request: ImageRequest) -> str:
        """The entity tag of the answer, with its quotes: a digest of everything that its bytes depend on."""
        return f'"{hashlib.sha256(f"{self._fingerprint} {request!r}".encode()).hexdigest()[:32]}"'

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
        pending = self._pending.get(tag)
        if pending is None:
            pending = self._start(tag, request)
            source = "computed"
        else:
            source = "shared"
        pending.clients += 1
        try:
            await asyncio.wait({pending.task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pending.clients -= 1
            if not pending.clients and not pending.task.done():
                pending.task.cancel()
                self._finish(tag, pending)
        self._count(source if pending.task.done() else "dropped")
        return pending.task.result() if pending.task.done() else None

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """While an answer of ``size`` bytes is sent: clients that read slowly must not fill the memory."""
        self._sending += size
        try:
            yield
        finally:
            self._sending -= size

    def close(self) -> None:
        """Wait for the files that are being encoded."""
        for pool in (self._encoders, self._walks):
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, tag: str, request: ImageRequest) -> _Pending:
        size = (self._images + request.images) * 3 * self._model.size**2 + self._sending
        is_alone = not self._pending and not self._sending
        if len(self._pending) >= MAX_REQUESTS or (size > MAX_BYTES and not is_alone):
            self._count("refused")
            seconds = math.ceil(self._images * self._batches.seconds_per_image)
            raise QueueFull(max(1, min(seconds, MAX_RETRY_AFTER)))
        pending = self._pending[tag] = _Pending(request, asyncio.create_task(self._make(request)))
        pending.task.add_done_callback(lambda _: self._finish(tag, pending))
        self._count_waiting(request.images)
        return pending

    def _finish(self, tag: str, pending: _Pending) -> None:
        """Remove an answer that is over, and cache its answer."""
        if self._pending.get(tag) is not pending:  # done before
            return
        del self._pending[tag]
        self._count_waiting(-pending.request.images)
        if pending.task.done() and not pending.task.cancelled() and pending.task.exception() is None:
            self._keep(tag, pending.task.result())

    async def _make(self, request: ImageRequest) -> bytes:
        keys = partial(points, request, self._model.z_dim)
        pixels = await self._batches.compute(keys, request.images, request.psi, labels(request))
        pool = self._walks if request.path == WALK else self._encoders
        cancelled = Event()
        try:
            xmp = origin(request, self._model.generator)
            return await asyncio.get_running_loop().run_in_executor(
                pool, encode_answer, request, pixels, xmp, cancelled
            )
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
        self._metrics.queue.set(len(self._pending))
        self._metrics.queue_images.set(self._images)
