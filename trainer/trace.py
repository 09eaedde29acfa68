"""A trace of a few steps of a training: which operations take the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from catgan.command import say

_BEFORE = 10  # steps before the trace: memory is allocated, cuDNN chooses its algorithms, networks are compiled
_ROWS = 40


@contextmanager
def traced(steps: int, device: torch.device, folder: Path, nimg: int = 0) -> Iterator[Callable[[], None]]:
    """Trace ``steps`` steps, after the first ten. Yields a function to call at the end of each step.

    For a training that begins or continues at ``nimg`` images, ``folder`` gets ``profile_000120kimg.txt``, the
    operations that took the longest by themselves, and ``profile_000120kimg.json.gz``, the timeline for
    https://ui.perfetto.dev. A training that ends before has fewer steps in them, or writes neither.
    """
    if steps == 0:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # its messages are about devices that this machine does not have
    from torch import profiler

    on_gpu = device.type == "cuda"
    activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * on_gpu

    def save(trace: profiler.profile) -> None:
        if trace.step_num == _BEFORE:
            return
        traced_steps = f"{trace.step_num - _BEFORE} steps"
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
        name = f"profile_{nimg // 1000:06d}kimg"
        summary, timeline = folder / f"{name}.txt", folder / f"{name}.json.gz"
        try:
            summary.write_text(f"{traced_steps}\n{table}", encoding="utf-8")
            trace.export_chrome_trace(str(timeline))
        except OSError as error:  # a full disk does not end a training
            say(f"warning: the trace cannot be written to {folder} ({error.strerror})")
            return
        say(f"traced {traced_steps}: {summary}, and {timeline.name} for https://ui.perfetto.dev")

    schedule = profiler.schedule(wait=_BEFORE - 1, warmup=1, active=steps, repeat=1)
    with profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as trace:
        yield trace.step
