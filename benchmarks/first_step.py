"""Where the time goes between submitting a training and its first step."""

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

import cpu_time
from measure import count, machine, table

from catgan.command import Parser, UserError, run_command, say
from catgan.files import cache_dir
from trainer.data.open import open_data
from trainer.recipes import DEFAULT_CPU, resolve

NAME = "first_step.py"
ROOT = Path(__file__).resolve().parents[1]

STAGES = (
    ("opened", "run ", "Python, imports, options, MLflow's run opened"),
    ("started", "training ", "Ray and its workers, imports there"),
    ("drawn", "kimg ", "statistics of the reals, networks, first grids, first batch, first step"),
)
"""Name, the words that a line begins with when the stage is over, what it consists of."""

IMPORTS = ("torch", "mlflow.tracking", "ray.train.torch", "trainer.launch.driver", "trainer.launch.worker")

_DESCRIPTION = """\
Starts `trainer/run.py` on this machine, in one process and through Ray Train, with the statistics of the real
pictures in the cache and without, and notes when its lines appear, up to the first step. Wall and CPU seconds of each
stage, medians; then what some imports take by themselves, each in a fresh Python.

examples:
  python benchmarks/first_step.py
  python benchmarks/first_step.py --recipe dcgan-cpu-64 --repeats 5
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="as run.py takes it (default: 0 1)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="of each (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    data = open_data(None, config.model.size, config.loader).root
    settings = [(workers, cached) for workers in a.workers for cached in (False, True)]
    found: dict[tuple[int, bool], list[dict[str, tuple[float, float]]]] = {setting: [] for setting in settings}
    imports: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(a.repeats):
            for workers in a.workers:
                cache = Path(folder, f"cache-{i}-{workers}")
                cache.mkdir()
                for network in cache_dir().glob("efflite0-*.onnx"):  # kept: only the statistics are to be missing
                    (cache / network.name).symlink_to(network)
                for cached in (False, True):  # the first one fills the cache
                    stages = _start(config.recipe, data, Path(folder, f"{i}-{workers}-{cached}"), workers, cache)
                    found[workers, cached].append(stages)
                    say(f"round {i + 1}/{a.repeats}, --workers {workers}, cached {cached}: {stages}")
            for name in IMPORTS:
                imports[name].append(_import(name))
    results = [
        {"workers": workers, "cached": cached, **_medians(found[workers, cached])} for workers, cached in settings
    ]
    names = [name for name, *_ in STAGES]
    table(
        ("workers", "cached", *(f"{name} s (CPU)" for name in names), "in all"),
        [
            (r["workers"], r["cached"], *(f"{r[n]['seconds']} ({r[n]['cpu_seconds']})" for n in names), r["seconds"])
            for r in results
        ],
    )
    for name, _, what in STAGES:
        say(f"{name}: {what}")
    alone = {name: _median_pair(pairs) for name, pairs in imports.items()}
    table(("import", "s", "CPU s"), [(name, *pair.values()) for name, pair in alone.items()])
    return {"recipe": config.recipe, "results": results, "imports": alone, "machine": machine()}


def _start(recipe: str, data: str, run_dir: Path, workers: int, cache: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each stage of a training that is ended after its first step.

    Raises:
        UserError: it ended before that; with its last line.
    """
    options = ["--data", data, "--out", str(run_dir.parent), "--name", run_dir.name, "--workers", str(workers)]
    options += ["--eval.extractor", "efflite0", "--track.uri", f"sqlite:///{run_dir}.db", "--track.tick-kimg", "0.001"]
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


def _stages(lines: Iterator[str], pid: int, began: float) -> Iterator[tuple[str, tuple[float, float]]]:
    cpu, printed = 0.0, "nothing was printed"
    for name, words, _ in STAGES:
        for line in lines:
            printed = line.strip()
            if re.match(rf"(\([^)]*\) )?{words}", line):  # Ray puts the worker's name in brackets before it
                break
        else:
            raise UserError(f"the training ended before it had {name}: {printed}")
        now, used = time.perf_counter(), cpu_time.of_tree(pid)
        yield name, (round(now - began, 2), round(used - cpu, 2))
        began, cpu = now, used


def _import(name: str) -> tuple[float, float]:
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": "."})
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def _medians(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    stages = {name: _median_pair([stages[name] for stages in rounds]) for name in rounds[0]}
    return stages | {"seconds": round(sum(stage["seconds"] for stage in stages.values()), 2)}


def _median_pair(pairs: list[tuple[float, float]]) -> dict[str, float]:
    seconds, cpu = zip(*pairs, strict=True)
    return {"seconds": round(statistics.median(seconds), 2), "cpu_seconds": round(statistics.median(cpu), 2)}


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
