"""Where does the time go between starting a training and its first step?

Starts `trainer/run.py` on this machine, in one process and through Ray Train, each with the statistics of the real
images missing from the cache and then with them in it, and notes when its progress lines appear. Linux only.

  opened    Python, imports, options, opening the run in MLflow
  started   starting Ray and its workers, imports there
  drawn     statistics of the real images, networks, first sample grids, first batch, first step

Each stage has its wall and CPU seconds, medians over the repeats. `imports` has what some modules take to import, each
in a fresh Python. There is no ratio: compare the stages with each other.

examples:
  python benchmarks/first_step.py
  python benchmarks/first_step.py --recipe dcgan-cpu-64 --repeats 5
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from measure import ROOT, count, machine, run_timed, table

from catgan.command import Parser, UserError, run_command, say
from catgan.files import cache_dir
from trainer.data.open import open_data
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.tracking.server import sqlite_uri

STAGES = {"opened": "run ", "started": "training ", "drawn": "kimg "}
"""Stages by name, with the first words of the line that appears when the stage is over."""

IMPORTS = ("torch", "mlflow.tracking", "ray.train.torch", "trainer.launch.driver", "trainer.launch.worker")

Times = tuple[float, float]
"""Wall and CPU seconds."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/first_step.py", __doc__)
    add = parser.add_argument
    add("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 1], help="as run.py takes it (default: 0 1)")
    add("--repeats", type=count, default=3, metavar="N", help="of each (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    data = open_data(None, config.model.size, config.loader).root
    found: dict[tuple[int, bool], list[dict[str, Times]]] = {(w, c): [] for w in a.workers for c in (False, True)}
    imports: dict[str, list[Times]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(a.repeats):
            for workers in a.workers:
                cache = Path(folder, f"cache-{i}-{workers}")
                cache.mkdir()
                for network in cache_dir().glob("efflite0-*.onnx"):  # keep it: only the statistics are to be missing
                    (cache / network.name).symlink_to(network)
                for cached in (False, True):  # the first run fills the cache
                    stages = _start(config.recipe, data, Path(folder, f"{i}-{workers}-{cached}"), workers, cache)
                    found[workers, cached].append(stages)
                    say(f"round {i + 1}/{a.repeats}, --workers {workers}, cached {cached}: {stages}")
            for name in IMPORTS:
                imports[name].append(run_timed(["-c", f"import {name}"], os.environ | {"PYTHONPATH": str(ROOT)})[1:])
    results = [{"workers": w, "cached": c, **_stage_medians(rounds)} for (w, c), rounds in found.items()]
    table(
        ("workers", "cached", *(f"{name} s (CPU)" for name in STAGES), "total s"),
        [
            (r["workers"], r["cached"], *(f"{r[n]['seconds']} ({r[n]['cpu_seconds']})" for n in STAGES), r["seconds"])
            for r in results
        ],
    )
    alone = {name: _medians(times) for name, times in imports.items()}
    table(("import", "s", "CPU s"), [(name, *times.values()) for name, times in alone.items()])
    return {"recipe": config.recipe, "results": results, "imports": alone, "machine": machine()}


def _start(recipe: str, data: str, run_dir: Path, workers: int, cache: Path) -> dict[str, Times]:
    """The stages of a training that is ended after its first step.

    Raises:
        UserError: it ended before that; with its last line.
    """
    options = ["--data", data, "--out", str(run_dir.parent), "--name", run_dir.name, "--workers", str(workers)]
    options += ["--eval.extractor", "efflite0", "--track.tick-kimg", "0.001"]
    options += ["--track.uri", sqlite_uri(Path(f"{run_dir}.db"))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "trainer" / "run.py"), recipe, *options],
        cwd=ROOT,
        env=environment | {"CATGAN_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        return dict(_stages(process.stderr, process.pid, began))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        process.wait()


def _stages(lines: Iterator[str], pid: int, began: float) -> Iterator[tuple[str, Times]]:
    cpu, printed = 0.0, "nothing was printed"
    for name, words in STAGES.items():
        for line in lines:
            printed = line.strip()
            if re.match(rf"(\([^)]*\) )?{words}", line):  # Ray puts the worker's name in brackets before it
                break
        else:
            raise UserError(f"the training ended before the stage {name!r} was over: {printed}")
        now, used = time.perf_counter(), _cpu_seconds(pid)
        yield name, (round(now - began, 2), round(used - cpu, 2))
        began, cpu = now, used


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and everything below it, children that have ended included."""
    root, total = psutil.Process(pid), 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and of ended children
    return total


def _stage_medians(rounds: list[dict[str, Times]]) -> dict[str, Any]:
    stages = {name: _medians([stages[name] for stages in rounds]) for name in STAGES}
    return stages | {"seconds": round(sum(stage["seconds"] for stage in stages.values()), 2)}


def _medians(times: list[Times]) -> dict[str, float]:
    seconds, cpu = zip(*times, strict=True)
    return {"seconds": round(statistics.median(seconds), 2), "cpu_seconds": round(statistics.median(cpu), 2)}


if __name__ == "__main__":
    run_command("first_step.py", main)
