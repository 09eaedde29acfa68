"""What Ray Train costs: ``trainer/run.py`` through Ray Train against the same training in one process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import count, device, machine, median_ratio, positive, table

from catgan.command import Parser, UserError, run_command, say
from trainer.data.manifest import Manifest
from trainer.data.open import open_data
from trainer.recipes import DEFAULT_CPU, resolve

NAME = "ray_overhead.py"
WORKERS = (0, 1, 2)
ROOT = Path(__file__).resolve().parents[1]

_DESCRIPTION = """\
Trains with `trainer/run.py --workers 0`, 1 and 2 in turns: same recipe, data, global batch and kimg. Compared are

  images/s   steady speed: the median of the run's ticks (metrics.jsonl) except the first, without evaluations
  seconds    from start to end of the command: imports, Ray's start, evaluations and the export included

`ratio` is the steady speed of --workers 1 over that of --workers 0; 1 means that Ray Train costs nothing once it runs.
--workers 2 gives each worker half of the cores and half of the batch. An unmeasured short run comes first, so that
nobody pays alone for caches. RAY_ADDRESS is ignored: each run has a Ray of its own on this machine.

examples:
  python benchmarks/ray_overhead.py
  python benchmarks/ray_overhead.py --recipe dcgan-32 --kimg 40 --repeats 5
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it, trained on drawn cats (default: %(default)s)"
    )
    parser.add_argument(
        "--kimg", type=positive, default=12, metavar="X", help="thousands of images per run (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="rounds of runs (default: %(default)s)")
    a = parser.parse_args(argv)
    device()
    config = resolve(a.recipe, None, gpu=False)
    manifest = open_data(None, config.model.size, config.loader)
    speeds: dict[int, list[float]] = {n: [] for n in WORKERS}
    seconds: dict[int, list[float]] = {n: [] for n in WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        say("one short run to fill caches")
        _train(config.recipe, manifest, out / "warm-up", workers=1, kimg=a.kimg / 10)
        for i in range(a.repeats):
            for workers in WORKERS:
                speed, took = _train(config.recipe, manifest, out / f"{i}-{workers}", workers=workers, kimg=a.kimg)
                say(f"round {i + 1}/{a.repeats}, --workers {workers}: {speed:.1f} images/s, {took:.1f} s in all")
                speeds[workers].append(speed)
                seconds[workers].append(took)
    results = [
        {
            "workers": n,
            "images_per_second": round(statistics.median(speeds[n]), 1),
            "seconds": round(statistics.median(seconds[n]), 1),
            "ratio": round(median_ratio(speeds[n], speeds[0]), 3),
        }
        for n in WORKERS
    ]
    table(("workers", "images/s", "seconds", "ratio"), [tuple(r.values()) for r in results])
    return {
        "recipe": config.recipe,
        "kimg": a.kimg,
        "results": results,
        "ratio": results[1]["ratio"],
        "machine": machine(),
    }


def _train(recipe: str, manifest: Manifest, run_dir: Path, *, workers: int, kimg: float) -> tuple[float, float]:
    """Steady images per second of one run in ``run_dir``, and the seconds it took in all.

    Raises:
        UserError: the training failed; with the last line it printed.
    """
    options = {
        "--data": manifest.root,
        "--out": str(run_dir.parent),
        "--name": run_dir.name,
        "--workers": str(workers),
        "--kimg": str(kimg),
        "--track.uri": f"sqlite:///{run_dir.parent / 'mlflow.db'}",
        "--track.tick-kimg": str(kimg / 12),
        "--track.snapshot-kimg": str(kimg / 3),
        "--eval.extractor": "efflite0",
        "--eval.num": "256",
    }
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), recipe]
    for option, value in options.items():
        command += [option, value]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode != 0:
        printed = done.stderr.strip().splitlines() or ["nothing was printed"]
        raise UserError(f"`{' '.join(command)}` ended with status {done.returncode}: {printed[-1]}")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    name = "speed/images_per_second"
    ticks = [values[name] for line in lines if name in (values := json.loads(line))]
    return statistics.median(ticks[1:] or ticks), took


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
