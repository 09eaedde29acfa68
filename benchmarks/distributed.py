"""What does Ray Train cost next to torchrun, and what does a second worker on this machine gain?

The same training (trainer.loop, drawn cats, one thread per worker, the same batch for each worker) runs in three ways:

  process    one process: one worker, no communication
  torchrun   N workers started by torchrun, gradients summed by DistributedDataParallel
  ray        the same N workers started by Ray Train, as run.py starts them

All three are up at once and take turns of some steps; all processes of the other two, Ray's daemons included, are
stopped meanwhile (SIGSTOP). The speeds compared are therefore seconds apart. Start-up, evaluation and checkpoints are
not measured. Ratios are medians over the rounds; `quartiles` has their spread.

  ratio   images/s through Ray over images/s through torchrun; 1 means that Ray Train costs nothing
  gain    images/s of N workers through torchrun over images/s of one process; N would be perfect

examples:
  python benchmarks/distributed.py
  python benchmarks/distributed.py --recipe r3gan-cpu-64 --batch 64 --steps 4
  python benchmarks/distributed.py --workers 1      on two cores: leaves a core to Ray's own processes
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from measure import ROOT, count, machine, table

from catgan.command import Parser, UserError, run_command
from catgan.dataset import Manifest
from trainer.config import Config
from trainer.data.build.progress import progress
from trainer.data.open import open_data
from trainer.distributed.context import LocalContext
from trainer.launch import connect
from trainer.launch import ray as launch_ray
from trainer.launch.worker import Job, work
from trainer.recipes import DEFAULT_CPU, resolve

PROCESS, TORCHRUN, RAY = WAYS = ("process", "torchrun", "ray")


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/distributed.py", __doc__)
    add = parser.add_argument
    add("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    add("--workers", type=count, default=2, metavar="N", help="of torchrun and of Ray (default: %(default)s)")
    add("--batch", type=count, metavar="N", help="of each worker (default: the recipe's batch)")
    add("--steps", type=count, default=20, metavar="N", help="of a turn (default: %(default)s)")
    add("--repeats", type=count, default=20, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    batch = a.batch or config.batch
    speeds = _measure(config, batch, a.workers, a.steps, a.repeats)
    medians = {way: round(statistics.median(speeds[way]), 1) for way in WAYS}
    step_ms = {way: round(1e3 * batch * (1 if way == PROCESS else a.workers) / medians[way], 1) for way in WAYS}
    table(("way", "images/s", "ms/step"), [(way, medians[way], step_ms[way]) for way in WAYS])
    quartiles = {
        "ratio": _quartiles(speeds[RAY], speeds[TORCHRUN]),
        "gain": _quartiles(speeds[TORCHRUN], speeds[PROCESS]),
    }
    return {
        "recipe": config.recipe,
        "workers": a.workers,
        "batch_per_worker": batch,
        "images_per_second": medians,
        "step_ms": step_ms,
        **{name: values[1] for name, values in quartiles.items()},
        "quartiles": quartiles,
        "machine": machine(),
    }


def _measure(config: Config, batch: int, workers: int, steps: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of each way, one value per round."""
    manifest = open_data(None, config.model.size, config.loader)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = {}
        for way in WAYS:
            number = 1 if way == PROCESS else workers
            endless = _endless(config, batch * number, steps)
            trainings[way] = stack.enter_context(Training(way, number, endless, manifest, Path(folder, way)))
        for training in trainings.values():
            training.turn()  # start-up and first steps
        for i in progress(range(repeats), "turns", "round", repeats):
            for way in WAYS if i % 2 == 0 else WAYS[::-1]:  # neither of two is always the later one
                speeds[way].append(trainings[way].turn())
    return speeds


def _endless(config: Config, batch: int, steps: int) -> Config:
    """The recipe with a tick every ``steps`` steps, and without an evaluation or checkpoint within reach."""
    return replace(
        config,
        batch=batch,
        kimg=1e6,
        track=replace(config.track, tick_kimg=steps * batch / 1000, snapshot_kimg=1e6, offline=True),
        eval=replace(config.eval, extractor="efflite0", num=64),
    )


def _quartiles(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of ``ours`` over ``other``, round by round."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return [round(q, 3) for q in (statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3)]


class Training:
    """A training in processes of its own, which are stopped except during its turns."""

    def __init__(self, way: str, workers: int, config: Config, manifest: Manifest, run_dir: Path) -> None:
        self.way, self.images = way, 1000 * config.track.tick_kimg
        self.metrics, self.log = run_dir / "metrics.jsonl", run_dir.with_suffix(".log")
        run_dir.mkdir()
        job = Job(config.to_dict(), manifest.root, str(run_dir), tracking_uri="", run_id="benchmark", resume_from=None)
        job_file = run_dir.with_suffix(".json")
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        command = [sys.executable, *(launcher if way == TORCHRUN else []), __file__, way, str(job_file), str(workers)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("wb") as output:
            self.root = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self._each(psutil.Process.suspend)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(psutil.Process.suspend)  # a stopped process starts no others, so none is missed
        self._each(psutil.Process.kill)
        self.root.wait()

    def turn(self) -> float:
        """Let it train until its next tick. Returns images per second.

        Raises:
            UserError: it ended instead; with the last line it printed.
        """
        ticks = self._ticks()
        began = time.perf_counter()
        self._each(psutil.Process.resume)
        while self._ticks() == ticks:
            if self.root.poll() is not None:
                printed = self.log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
                raise UserError(f"{self.way} ended with status {self.root.returncode}: {printed[-1]}")
            time.sleep(0.01)
        self._each(psutil.Process.suspend)
        return self.images / (time.perf_counter() - began)

    def _each(self, do: Callable[[psutil.Process], None]) -> None:
        with suppress(psutil.NoSuchProcess):  # it has ended
            for process in (self.root, *self.root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    do(process)

    def _ticks(self) -> int:
        """Ticks in metrics.jsonl, whose last line may be incomplete."""
        if not self.metrics.is_file():
            return 0
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        return sum("speed/images_per_second" in line for line in lines)


class TorchrunContext(LocalContext):
    """A worker started by torchrun: a process group, and no stop requests."""

    def __init__(self) -> None:
        super().__init__()
        dist.init_process_group("gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def report(self, metrics: dict[str, Any]) -> None:
        dist.barrier()


def train(way: str, job_file: str, workers: str) -> None:
    """Be one of the trainings: this script starts itself with these arguments."""
    job = Job(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    if way == RAY:
        # A Ray of exactly as many CPUs as workers gives each worker one thread.
        with mock.patch.object(connect, "cores", return_value=int(workers)):
            connect.connect_ray(int(workers))
            launch_ray.run_on_ray(job, int(workers))
    else:
        work(job, TorchrunContext() if way == TORCHRUN else LocalContext())


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        train(*sys.argv[1:])
    else:
        run_command("distributed.py", main)
