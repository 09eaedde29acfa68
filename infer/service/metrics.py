"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "catinfer_requests", "Answers by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "catinfer_request_seconds",
            "From a request's header to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("catinfer_images", "Images computed", registry=registry)
        self.batches = Histogram(
            "catinfer_batch_images",
            "Images computed in one call of the generator",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Counter("catinfer_batch_seconds", "Seconds in the generator", registry=registry)
        self.answers = Counter(
            "catinfer_answers",
            "Answers with images: computed, from the cache, shared with an equal request that was under way, "
            "refused because the queue was full, or dropped because the client had gone",
            ["source"],
            registry=registry,
        )
        for source in ("computed", "cache", "shared", "refused", "dropped"):
            self.answers.labels(source)
        self.queue = Gauge("catinfer_queue_requests", "Requests that wait or are computed", registry=registry)
        self.queue_images = Gauge("catinfer_queue_images", "Images of these requests", registry=registry)
        self.cache_bytes = Gauge("catinfer_cache_bytes", "Size of the cached answers", registry=registry)

    def text(self) -> bytes:
        """All values in the text format of Prometheus."""
        return generate_latest(self._registry)
