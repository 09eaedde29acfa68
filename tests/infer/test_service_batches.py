"""The queue in front of the generator, and the answers behind it, without HTTP and with generators that only count."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import numpy as np
import pytest

from catgan.command import UserError
from infer.provenance import Provenance
from infer.service import answers as answers_module
from infer.service import batches as batches_module
from infer.service.answers import Answers, QueueFull
from infer.service.batches import Batches
from infer.service.encoding import Cancelled, encode_answer
from infer.service.metrics import Metrics
from infer.service.model import Model
from infer.service.parameters import GRID, IMAGE, WALK, ImageRequest
from infer.session import CPU, CUDA

SIZE = 4


class Counting:
    """A generator whose image is its latent's value times psi plus its label everywhere. Waits for ``go`` before each
    call, and fails for NaN.

    Attributes:
        calls: the latents of each call.
        begun: set when a call begins.
    """

    size, z_dim, device = SIZE, 1, "cpu"

    def __init__(self, provider: str = CPU, sha256: str = "a" * 64) -> None:
        self.provider, self.sha256 = provider, sha256
        self.calls: list[list[float]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, z: np.ndarray, psi: np.ndarray, label: np.ndarray) -> np.ndarray:
        self.calls.append(z[:, 0].tolist())
        self.begun.set()
        self.go.wait(10)
        scaled = z * psi[:, None] + label[:, None]
        if np.isnan(scaled).any():
            raise UserError("not finite")
        return np.broadcast_to(scaled.astype(np.uint8)[:, :, None, None], (len(z), SIZE, SIZE, 3))


def values(*numbers: float) -> Callable[[], np.ndarray]:
    """The latents ``numbers``, as ``Batches.compute`` takes them."""
    return lambda: np.array(numbers, np.float32)[:, None]


@contextlib.asynccontextmanager
async def running(generator: Counting) -> AsyncIterator[Batches]:
    batches = Batches(generator, Metrics())  # type: ignore[arg-type]
    task = asyncio.create_task(batches.run())
    try:
        yield batches
    finally:
        generator.go.set()
        task.cancel()
        await asyncio.wait({task})


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(500):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not happen")


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "cores", lambda: 2)  # so 8 images per call


async def _after_the_first(
    generator: Counting, *jobs: tuple[float, ...], psis: Iterable[float] = itertools.repeat(1.0)
) -> list[np.ndarray]:
    """The results of ``jobs``, which all wait while the image 99 is computed."""
    async with running(generator) as batches:
        generator.go.clear()
        first = asyncio.create_task(batches.compute(values(99), 1))
        await until(generator.begun.is_set)
        tasks = [
            asyncio.create_task(batches.compute(values(*job), len(job), psi))
            for job, psi in zip(jobs, psis, strict=False)
        ]
        await asyncio.sleep(0)
        generator.go.set()
        await first
        return await asyncio.gather(*tasks)


def test_what_waits_is_computed_in_one_call() -> None:
    generator = Counting()
    results = asyncio.run(_after_the_first(generator, (1,), (2, 3), (4,)))
    assert generator.calls == [[99], [1, 2, 3, 4]]
    assert [result[:, 0, 0, 0].tolist() for result in results] == [[1], [2, 3], [4]]
    assert all(result.shape[1:] == (SIZE, SIZE, 3) for result in results)


def test_each_job_has_its_psi() -> None:
    generator = Counting()
    results = asyncio.run(_after_the_first(generator, (10, 20), (4,), psis=(0.5, 1.0)))
    assert generator.calls == [[99], [10, 20, 4]]
    assert [result[:, 0, 0, 0].tolist() for result in results] == [[5, 10], [4]]


def test_large_jobs_let_others_pass() -> None:
    generator = Counting()
    large = tuple(range(20))
    results = asyncio.run(_after_the_first(generator, large, (50,), (51,)))
    assert generator.calls == [[99], [*range(8)], [50, 51, *range(8, 14)], [*range(14, 20)]]
    assert [result[:, 0, 0, 0].tolist() for result in results] == [[*large], [50], [51]]


def test_cuda_has_the_batches_of_the_session() -> None:
    generator = Counting(CUDA)
    asyncio.run(_after_the_first(generator, tuple(range(40))))
    assert [len(call) for call in generator.calls] == [1, 32, 8]


def test_one_failure_is_not_that_of_others() -> None:
    async def scenario() -> list[Any]:
        async with running(generator) as batches:
            jobs = [(1.0,), (float("nan"),), (3.0,)]
            tasks = [asyncio.create_task(batches.compute(values(*job), 1)) for job in jobs]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return [*results, await batches.compute(values(7), 1)]

    generator = Counting()
    first, failed, third, later = asyncio.run(scenario())
    assert (first.max(), third.max(), later.max()) == (1, 3, 7)
    assert isinstance(failed, UserError)


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def scenario() -> None:
        async with running(generator) as batches:
            generator.go.clear()
            large = asyncio.create_task(batches.compute(values(*range(100)), 100))
            await until(generator.begun.is_set)
            other = asyncio.create_task(batches.compute(values(200), 1))
            unwanted = asyncio.create_task(batches.compute(values(201), 1))
            await asyncio.sleep(0)
            large.cancel()
            unwanted.cancel()
            await asyncio.sleep(0)
            generator.go.set()
            assert (await other).max() == 200

    generator = Counting()
    asyncio.run(scenario())
    assert generator.calls == [[*range(8)], [200]]


# --- answers


XMP = Provenance("image", "a" * 64, (0,), (1.0,), device="cpu").packet()


def request(seed: int = 0, n: int = 1) -> ImageRequest:
    return ImageRequest(GRID if n > 1 else IMAGE, tuple(range(seed, seed + n)), 1.0, "npy")


async def _never() -> None:
    await asyncio.Event().wait()


def with_answers(scenario: Callable[[Answers, Counting, Metrics], Coroutine[Any, Any, None]]) -> Metrics:
    """Run ``scenario``. Returns the metrics."""
    metrics = Metrics()

    async def run() -> None:
        generator = Counting()
        async with running(generator) as batches:
            answers = Answers(Model(generator, {"catgan": "1"}), batches, metrics)  # type: ignore[arg-type]
            try:
                await scenario(answers, generator, metrics)
            finally:
                generator.go.set()
                answers.close()

    asyncio.run(run())
    return metrics


def counted(metrics: Metrics, source: str) -> float:
    return float(metrics.answers.labels(source)._value.get())


def test_equal_requests_share_one_computation_and_the_cache() -> None:
    async def scenario(answers: Answers, generator: Counting, _: Metrics) -> None:
        gone = asyncio.create_task(_never())
        first = await asyncio.gather(*(answers.get(request(5), gone) for _ in range(4)))
        again = await answers.get(request(5), gone)
        assert len({*first, again}) == 1
        assert len(generator.calls) == 1
        gone.cancel()

    metrics = with_answers(scenario)
    assert [counted(metrics, source) for source in ("computed", "shared", "cache", "dropped")] == [1, 3, 1, 0]


@pytest.mark.parametrize("leaving", [1, 2])
def test_an_answer_is_computed_while_one_client_waits_for_it(leaving: int) -> None:
    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        generator.go.clear()
        leave = asyncio.Event()
        gone = [asyncio.create_task(_wait(leave if i < leaving else asyncio.Event())) for i in range(2)]
        clients = [asyncio.create_task(answers.get(request(0, 20), one)) for one in gone]
        await until(generator.begun.is_set)
        leave.set()
        await until(lambda: sum(client.done() for client in clients) == leaving)
        if leaving == 2:
            assert metrics.queue._value.get() == metrics.queue_images._value.get() == 0
        generator.go.set()
        results = await asyncio.gather(*clients)
        assert results[0] is None
        assert (results[1] is None) == (leaving == 2)
        for one in gone:
            one.cancel()
        await answers._batches.compute(values(9), 1)  # behind what is left of the others
        assert sum(map(len, generator.calls)) == (8 if leaving == 2 else 20) + 1

    metrics = with_answers(scenario)
    assert counted(metrics, "dropped") == leaving


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_REQUESTS", 3)
    monkeypatch.setattr(answers_module, "MAX_BYTES", 10 * 3 * SIZE**2)

    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        gone = asyncio.create_task(_never())
        answers._batches.seconds_per_image = 1.5
        alone = await answers.get(request(0, 11), gone)
        assert alone is not None, "a large request is accepted if it is alone"
        generator.go.clear()
        answers._batches.seconds_per_image = 1.5
        waiting = [asyncio.create_task(answers.get(request(100 * i, 2), gone)) for i in range(1, 3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await answers.get(request(900, 7), gone)
        assert full.value.retry_after == 6
        assert metrics.queue_images._value.get() == 4
        waiting.append(asyncio.create_task(answers.get(request(901, 6), gone)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await answers.get(request(999), gone)
        joins = asyncio.create_task(answers.get(request(100, 2), gone))  # costs nothing
        await asyncio.sleep(0)
        generator.go.set()
        assert all(await asyncio.gather(*waiting, joins))
        assert await answers.get(request(999), gone)
        gone.cancel()

    metrics = with_answers(scenario)
    assert counted(metrics, "refused") == 2
    assert metrics.queue._value.get() == metrics.queue_images._value.get() == 0


def test_what_is_being_sent_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_BYTES", 10 * 3 * SIZE**2)

    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        gone = asyncio.create_task(_never())
        with answers.sending(9 * 3 * SIZE**2):
            assert await answers.get(request(0), gone)
            with pytest.raises(QueueFull):
                await answers.get(request(1, 2), gone)
        assert await answers.get(request(1, 2), gone)
        gone.cancel()

    with_answers(scenario)


def test_the_cache_forgets_what_was_used_least_recently(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(encode_answer(request(), np.zeros((1, SIZE, SIZE, 3), np.uint8), XMP, threading.Event()))
    monkeypatch.setattr(answers_module, "CACHE_BYTES", 4 * size)

    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        gone = asyncio.create_task(_never())
        for seed in (0, 1, 2, 3, 0, 4):  # 4 replaces 1, since 0 was used again
            await answers.get(request(seed), gone)
            assert metrics.cache_bytes._value.get() <= 4 * size
        for seed, is_new in ((0, False), (1, True), (3, False)):
            before = len(generator.calls)
            await answers.get(request(seed), gone)
            assert len(generator.calls) - before == is_new, seed
        before = len(generator.calls)
        for _ in range(2):  # larger than a quarter of the cache
            await answers.get(request(50, 8), gone)
        assert len(generator.calls) - before == 2
        gone.cancel()

    with_answers(scenario)


def test_a_walk_that_nobody_waits_for_is_not_encoded_to_its_end() -> None:
    asked = ImageRequest(WALK, (0, 1), 1.0, "gif")
    cancelled = threading.Event()
    frames = np.zeros((40, SIZE, SIZE, 3), np.uint8)
    assert encode_answer(asked, frames, XMP, cancelled).startswith(b"GIF")
    cancelled.set()
    with pytest.raises(Cancelled):
        encode_answer(asked, frames, XMP, cancelled)


def test_images_do_not_wait_for_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    go, events = threading.Event(), []

    def encode(asked: ImageRequest, _: np.ndarray, xmp: bytes, cancelled: threading.Event) -> bytes:
        if asked.path == WALK:
            events.append(cancelled)
            go.wait(10)
        return b"file"

    monkeypatch.setattr(answers_module, "encode_answer", encode)

    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        leave = asyncio.Event()
        gone = asyncio.create_task(_wait(leave))
        walks = [asyncio.create_task(answers.get(ImageRequest(WALK, (i, i + 1), 1.0, "gif"), gone)) for i in range(9)]
        await until(lambda: bool(events))
        stays = asyncio.create_task(_never())
        assert await answers.get(request(3), stays) == b"file"
        leave.set()
        assert await asyncio.gather(*walks) == [None] * 9
        assert [event.is_set() for event in events] == [True]
        go.set()
        stays.cancel()

    with_answers(scenario)


def test_a_failure_is_not_kept() -> None:
    async def scenario(answers: Answers, generator: Counting, metrics: Metrics) -> None:
        gone = asyncio.create_task(_never())
        wrong = ImageRequest(IMAGE, (3,), float("nan"), "npy")
        for _ in range(2):
            with pytest.raises(UserError, match="not finite"):
                await answers.get(wrong, gone)
        assert len(generator.calls) == 2
        assert metrics.queue._value.get() == 0
        gone.cancel()

    with_answers(scenario)


def test_tags_name_everything_that_bytes_depend_on() -> None:
    def tag(asked: ImageRequest, digest: str = "a", provider: str = CPU, version: str = "1") -> str:
        model = Model(Counting(provider, digest), {"pillow": version})  # type: ignore[arg-type]
        return Answers(model, None, Metrics()).tag(asked)  # type: ignore[arg-type]

    base = request(1)
    others = [
        tag(request(2)),
        tag(request(1, 2)),
        tag(ImageRequest(IMAGE, (1,), 0.5, "npy")),
        tag(ImageRequest(IMAGE, (1,), 1.0, "png")),
        tag(ImageRequest(WALK, (1,), 1.0, "npy")),
        tag(base, digest="b"),
        tag(base, provider=CUDA),
        tag(base, version="2"),
    ]
    assert len({tag(base), *others}) == len(others) + 1
    assert tag(base) == tag(request(1))
