"""What a checkpoint costs the training that goes on meanwhile, kept on a disk and in a bucket."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import count, device, machine, table

from catgan.command import Parser, run_command
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.storage import open_storage
from trainer.loop import plan
from trainer.recipes import DEFAULT_CPU, resolve
from trainer.step import GAN

NAME = "checkpoint.py"
BUCKET = "benchmark"

_DESCRIPTION = """\
Saves checkpoints of a recipe with trainer.checkpoints.saver on the local disk and in S3 (moto's server in a process
of its own, on loopback) between training steps, and measures

  held_ms      how long `save` keeps the training thread: the copy of all states
  saving_s     CPU seconds until it is kept: encoding, SHA-256 and writing, in the saver's thread
  tick_s       seconds of a tick of the recipe if all threads were always busy: CPU seconds of steps over threads
  share        held_ms of a tick; below 0.01 is wanted
  share_cpu    saving_s of a snapshot's ticks: what a core does besides

Times are CPU times, which other processes disturb less: the thread's own for `held_ms`, else the process'.

examples:
  python benchmarks/checkpoint.py
  python benchmarks/checkpoint.py --recipe r3gan-64 --repeats 3
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    parser.add_argument("--batch", type=count, metavar="N", help="of the steps that are timed (default: the recipe's)")
    parser.add_argument("--repeats", type=count, default=10, metavar="N", help="checkpoints (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    tick, snapshot, _ = plan(config)
    batch = a.batch or config.batch
    place = device()
    gan = GAN(replace(config, batch=batch), place)
    size = config.model.size
    reals = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    steps: list[float] = []
    results = []
    with tempfile.TemporaryDirectory() as folder, _s3():
        places = {"disk": str(Path(folder, "run")), "s3": f"s3://{BUCKET}/run"}
        with mock.patch.dict(os.environ, {"CATGAN_CACHE": folder}):
            storages = {name: open_storage(location) for name, location in places.items()}
        savers = {name: Saver(storage, _fail) for name, storage in storages.items()}
        held: dict[str, list[float]] = {name: [] for name in places}
        saving: dict[str, list[float]] = {name: [] for name in places}
        for storage in storages.values():
            storage.make()
        for i in range(a.repeats + 1):
            for name, saver in savers.items():
                began = time.process_time()
                gan.step(reals, 10**9, reals if gan.fresh_reals else None)
                steps.append((time.process_time() - began) * config.batch / batch)
                state = {"nimg": i, "config": config.to_dict(), **gan.state_dict()}
                thread, process = time.thread_time(), time.process_time()
                saver.save(i, state)
                held[name].append(time.thread_time() - thread)
                saver.finish()
                saving[name].append(time.process_time() - process)
        checkpoint = storages["disk"].checkpoints()[-1]
        megabytes = sum(f.stat().st_size for f in Path(places["disk"], checkpoint).iterdir()) / 1e6
    tick_s = tick * statistics.median(steps[1:]) / torch.get_num_threads()
    for name in places:
        held_s, saving_s = statistics.median(held[name][1:]), statistics.median(saving[name][1:])
        results.append(
            {
                "where": name,
                "held_ms": round(1e3 * held_s, 2),
                "saving_s": round(saving_s, 3),
                "tick_s": round(tick_s, 2),
                "share": round(held_s / tick_s, 5),
                "share_cpu": round(saving_s / (tick_s * snapshot / tick), 5),
            }
        )
    table(tuple(results[0]), [tuple(r.values()) for r in results])
    return {
        "recipe": config.recipe,
        "megabytes": round(megabytes, 1),
        "results": results,
        "share": max(r["share"] for r in results),
        "machine": machine(),
    }


def _fail(problem: str) -> None:
    raise RuntimeError(problem)


@contextmanager
def _s3() -> Iterator[None]:
    """A bucket on a server of this machine, which the environment points to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            while server.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            import boto3

            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
    finally:
        server.terminate()
        server.wait()


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
