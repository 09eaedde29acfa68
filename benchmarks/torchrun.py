"""Ray Train against torchrun on the same loop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cpu_time
from measure import count, machine, median_ratio, table

from infer.command import Parser, UserError, run_command, say
from trainer.config import Config
from trainer.data.drawn import open_data
from trainer.data.manifest import Manifest
from trainer.launch import Job
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.tracking import open_run

NAME = "torchrun.py"
ROOT = Path(__file__).resolve().parents[1]
WAYS = ("torchrun", "ray")
WORKERS = 2
TICKS = 12

_DESCRIPTION = """\
Trains with two workers of one thread each, started by torchrun and by Ray Train, in turns. Both run the same loop
(trainer.loop) on the same data. Measured is from the first tick to the last one: time and CPU time per step, of all
processes of the training, Ray's own included. Start, evaluation and checkpoint lie outside.

  ratio    steps per second with Ray over those with torchrun; 1 means that Ray Train costs nothing
  others   the share of the machine's CPU time that went to other processes: above some percent, CPU times are what can
           be believed

examples:
  python benchmarks/torchrun.py
  python benchmarks/torchrun.py --recipe r3gan-cpu-64 --batch 32 --steps 100 --repeats 5
"""


@dataclass(frozen=True)
class Speed:
    """Of one training: milliseconds per step, CPU milliseconds per step and worker, and the others' share of the
    machine."""

    step_ms: float
    cpu_ms: float
    others: float


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it, trained on drawn cats (default: %(default)s)"
    )
    parser.add_argument("--batch", type=count, metavar="N", help="of each worker (default: the recipe's batch)")
    parser.add_argument("--steps", type=count, default=240, metavar="N", help="per training (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of runs (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.steps < 2 * TICKS:
        raise UserError(f"--steps {a.steps}: give at least {2 * TICKS}")
    config = resolve(a.recipe, None, gpu=False)
    manifest = open_data(None, config.model.size, config.loader)
    batch = (a.batch or config.batch) * WORKERS
    speeds: dict[str, list[Speed]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(a.repeats):
            for way in WAYS if i % 2 == 0 else WAYS[::-1]:  # neither is always the later one
                speed = _train(_short(config, batch, a.steps), manifest, Path(folder, f"{i}-{way}"), way)
                say(
                    f"round {i + 1}/{a.repeats}, {way}: {speed.step_ms:.1f} ms a step,"
                    f" {speed.cpu_ms:.1f} CPU ms a step and worker, others {speed.others:.0%}"
                )
                speeds[way].append(speed)
    results = [
        {
            "way": way,
            **{
                name: round(statistics.median(getattr(s, name) for s in speeds[way]), 3)
                for name in ("step_ms", "cpu_ms", "others")
            },
        }
        for way in WAYS
    ]
    table(("way", "ms/step", "CPU ms", "others"), [tuple(r.values()) for r in results])
    ours, other = speeds["ray"], speeds["torchrun"]
    return {
        "recipe": config.recipe,
        "batch_per_worker": a.batch or config.batch,
        "results": results,
        "ratio": round(median_ratio([1 / s.step_ms for s in ours], [1 / s.step_ms for s in other]), 3),
        "ratio_cpu": round(median_ratio([1 / s.cpu_ms for s in ours], [1 / s.cpu_ms for s in other]), 3),
        "rounds": {way: [asdict(s) for s in found] for way, found in speeds.items()},
        "machine": machine(),
    }


def _short(config: Config, batch: int, steps: int) -> Config:
    """The recipe for some steps: ``TICKS`` ticks, and at the end the one evaluation, a small one."""
    kimg = steps * batch / 1000
    return replace(
        config,
        batch=batch,
        kimg=kimg,
        track=replace(config.track, tick_kimg=kimg / TICKS, snapshot_kimg=kimg, offline=True),
        eval=replace(config.eval, extractor="efflite0", num=64),
    )


def _train(config: Config, manifest: Manifest, run_dir: Path, way: str) -> Speed:
    """Raises UserError: the training failed; with the last line it printed."""
    run_dir.mkdir()
    run_id = open_run(run_dir, "", "benchmark", config=config.to_dict(), manifest=manifest, offline=True)
    job = Job(config.to_dict(), manifest.root, str(run_dir), "", run_id, None)
    job_file, log = run_dir.with_suffix(".json"), run_dir.with_suffix(".log")
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    start = [sys.executable]
    if way == "torchrun":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command = [*start, str(ROOT / "benchmarks" / "torchrun_worker.py"), str(job_file), way, str(WORKERS)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        speed = _watch(process, run_dir / "metrics.jsonl", config.batch)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if speed is None or process.returncode:
        printed = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
        raise UserError(f"{way} ended with status {process.returncode}: {printed[-1]}")
    return speed


def _watch(process: subprocess.Popen[bytes], metrics: Path, batch: int) -> Speed | None:
    """Look on from the first tick to the last, until the training has ended."""
    first: tuple[float, float, float, int] | None = None
    last = first
    while process.poll() is None:
        ticks = _ticks(metrics)
        if ticks and (last is None or ticks[-1] > last[3]):
            last = (time.perf_counter(), cpu_time.of_tree(process.pid), cpu_time.of_machine(), ticks[-1])
            first = first or last
        time.sleep(0.02)
    if first is None or last is None or last == first:
        return None
    seconds, own, machine_, images = (b - a for a, b in zip(first, last, strict=True))
    steps = images / batch
    others = max(machine_ - own, 0.0) / (seconds * (os.cpu_count() or 1))
    return Speed(1e3 * seconds / steps, 1e3 * own / steps / WORKERS, others)


def _ticks(metrics: Path) -> list[int]:
    """Positions of the ticks so far; the last line may be half-written."""
    if not metrics.is_file():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return [values["nimg"] for line in lines if "speed/images_per_second" in (values := json.loads(line))]


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
