"""Ray Train against torchrun on the same loop."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cpu_time
import psutil
from measure import count, machine, quartiles, table

from catgan.command import Parser, UserError, run_command
from trainer.config import Config
from trainer.data.build.progress import progress
from trainer.data.manifest import Manifest
from trainer.data.open import open_data
from trainer.launch.worker import Job
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.tracking.tracker import open_run

NAME = "torchrun.py"
ROOT = Path(__file__).resolve().parents[1]
WAYS = ("torchrun", "ray")

_DESCRIPTION = """\
Trains with workers of one thread each, started by torchrun and by Ray Train: the same loop (trainer.loop) on the
same data. Both are up at once, and take turns of one tick: all processes of the other one, Ray's own included, are
stopped meanwhile. So the speeds compared are seconds apart, where those of whole trainings, one after the other, differ
by more than Ray costs. Start, evaluation and checkpoints lie outside of what is measured.

  ratio    steps per second with Ray over those with torchrun, the median of the rounds with its quartiles; 1 means
           that Ray Train costs nothing
  others   the share of the machine's CPU time that went to neither

examples:
  python benchmarks/torchrun.py
  python benchmarks/torchrun.py --workers 1        # on two cores: with a core left for Ray's own processes
  python benchmarks/torchrun.py --recipe r3gan-cpu-64 --batch 64 --steps 4
"""


@dataclass(frozen=True)
class Turn:
    """Milliseconds per step, CPU milliseconds per step and worker, and the others' share of the machine."""

    step_ms: float
    cpu_ms: float
    others: float


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it, trained on drawn cats (default: %(default)s)"
    )
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="of each training (default: %(default)s)")
    parser.add_argument("--batch", type=count, metavar="N", help="of each worker (default: the recipe's batch)")
    parser.add_argument("--steps", type=count, default=20, metavar="N", help="of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=40, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    manifest = open_data(None, config.model.size, config.loader)
    batch = a.batch or config.batch
    endless = _endless(config, batch * a.workers, a.steps)
    turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = {
            way: stack.enter_context(Training(endless, manifest, Path(folder, way), way, a.workers, a.steps))
            for way in WAYS
        }
        for training in trainings.values():
            training.turn()  # until it takes steps
        for i in progress(range(a.repeats), "turns", "round", a.repeats):
            for way in WAYS if i % 2 == 0 else WAYS[::-1]:  # neither is always the later one
                turns[way].append(trainings[way].turn())
    medians = {
        way: {name: round(statistics.median(getattr(t, name) for t in turns[way]), 3) for name in asdict(turns[way][0])}
        for way in WAYS
    }
    table(("way", "ms/step", "CPU ms", "others"), [(way, *medians[way].values()) for way in WAYS])
    ratios, ratios_cpu = (
        quartiles([getattr(t, name) / getattr(r, name) for t, r in zip(turns["torchrun"], turns["ray"], strict=True)])
        for name in ("step_ms", "cpu_ms")
    )
    return {
        "recipe": config.recipe,
        "workers": a.workers,
        "batch_per_worker": batch,
        "results": [{"way": way, **medians[way]} for way in WAYS],
        "ratio": ratios[1],
        "ratio_quartiles": ratios,
        "ratio_cpu": ratios_cpu[1],
        "machine": machine(),
    }


def _endless(config: Config, batch: int, steps: int) -> Config:
    """The recipe with a tick every ``steps`` steps, and no evaluation or checkpoint in sight."""
    return replace(
        config,
        batch=batch,
        kimg=1e6,
        track=replace(config.track, tick_kimg=steps * batch / 1000, snapshot_kimg=1e6, offline=True),
        eval=replace(config.eval, extractor="efflite0", num=64),
    )


class Training:
    """A training in processes of its own, which stand still except for their turns."""

    def __init__(self, config: Config, manifest: Manifest, run_dir: Path, way: str, workers: int, steps: int) -> None:
        self.way, self.workers, self.steps, self.metrics = way, workers, steps, run_dir / "metrics.jsonl"
        run_dir.mkdir()
        run_id = open_run(run_dir, "", "benchmark", config=config.to_dict(), manifest=manifest, offline=True)
        job = Job(config.to_dict(), manifest.root, str(run_dir), "", run_id, None)
        job_file, self.log = run_dir.with_suffix(".json"), run_dir.with_suffix(".log")
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        start = [sys.executable]
        if way == "torchrun":
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        command = [*start, str(ROOT / "benchmarks" / "torchrun_worker.py"), str(job_file), way, str(workers)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as output:
            self.root = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self._each(psutil.Process.suspend)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        # Those that stand still start nothing, so none is missed.
        self._each(psutil.Process.suspend)
        self._each(psutil.Process.kill)
        self.root.wait()

    def turn(self) -> Turn:
        """Let it train until its next tick.

        Raises:
            UserError: it ended instead; with the last line it printed.
        """
        ticks = self._ticks()
        before = cpu_time.of_tree(self.root.pid), cpu_time.of_machine()
        began = time.perf_counter()
        self._each(psutil.Process.resume)
        while self._ticks() == ticks:
            if self.root.poll() is not None:
                printed = self.log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
                raise UserError(f"{self.way} ended with status {self.root.returncode}: {printed[-1]}")
            time.sleep(0.01)
        self._each(psutil.Process.suspend)
        seconds = time.perf_counter() - began
        own, all_ = cpu_time.of_tree(self.root.pid) - before[0], cpu_time.of_machine() - before[1]
        others = max(all_ - own, 0.0) / (seconds * (os.cpu_count() or 1))
        return Turn(1e3 * seconds / self.steps, 1e3 * own / self.steps / self.workers, others)

    def _each(self, do: Callable[[psutil.Process], None]) -> None:
        for process in (self.root, *self.root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                do(process)

    def _ticks(self) -> int:
        """How many there were; the last line may be half-written."""
        if not self.metrics.is_file():
            return 0
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        return sum("speed/images_per_second" in line for line in lines)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
