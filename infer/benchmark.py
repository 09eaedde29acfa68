"""``catinfer --benchmark``: the speed of one file on this machine."""

from __future__ import annotations

import statistics
import time
from typing import Any

from catgan.command import say
from catgan.machine import cores
from infer.latents import latents
from infer.session import BATCH, CPU, Generator

BATCHES = (1, 16, 256)
SECONDS = 2.0  # per batch size; at least three calls are measured


def benchmark(onnx: str, device: str) -> dict[str, Any]:
    """Images per second, from latents to uint8 pixels without files, for calls with 1, 16 and 256 latents.

    The result is the median over the calls, after one call for warm-up. Raises ``UserError``.
    """
    start = time.perf_counter()
    generator = Generator(onnx, device)
    load = time.perf_counter() - start
    speeds = {}
    for batch in BATCHES:
        z = latents(range(batch), generator.z_dim)
        generator(z)
        times: list[float] = []
        while len(times) < 3 or sum(times) < SECONDS:
            call_start = time.perf_counter()
            generator(z)
            times.append(time.perf_counter() - call_start)
        speeds[str(batch)] = round(batch / statistics.median(times), 1)
        say(f"batch {batch}: {speeds[str(batch)]:,} images/s")
    return {
        "onnx": onnx,
        "size": generator.size,
        "provider": generator.provider,
        "threads": cores() if generator.provider == CPU else None,
        "pictures_per_call": BATCH[generator.provider],
        "load_seconds": round(load, 3),
        "pictures_per_second": speeds,
        "seconds": round(time.perf_counter() - start, 3),
    }
