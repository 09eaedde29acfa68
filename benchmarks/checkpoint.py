"""How long does a checkpoint hold up training, and what does saving it in the background cost?

Saves checkpoints of a recipe with trainer.checkpoints.saver between training steps, on the local disk and in S3 (moto's
server in a process of its own, on loopback).

  held_ms      time that `save` keeps the training thread: it copies all states
  saving_s     CPU seconds until the checkpoint is stored: encoding, SHA-256 and writing, in the saver's thread
  tick_s       seconds of a tick of the recipe if all threads were always busy: CPU seconds of its steps over threads
  share        held_ms as a part of a tick; the goal is below 0.01
  share_cpu    saving_s as a part of the time between two snapshots

Times are CPU times, which other processes disturb less: of the thread for `held_ms`, of the process for the others.

examples:
  python benchmarks/checkpoint.py
  python benchmarks/checkpoint.py --recipe r3gan-64 --repeats 3
"""

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

BUCKET = "benchmark"


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/checkpoint.py", __doc__)
    add = parser.add_argument
    add("--recipe", default=f"{DEFAULT_CPU}-32", help="as run.py takes it (default: %(default)s)")
    add("--batch", type=count, metavar="N", help="of the timed steps (default: the recipe's)")
    add("--repeats", type=count, default=10, metavar="N", help="checkpoints (default: %(default)s)")
    a = parser.parse_args(argv)
    config = resolve(a.recipe, None, gpu=False)
    batch = a.batch or config.batch
    gan = GAN(replace(config, batch=batch), device())
    size = config.model.size
    reals = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, _s3():
        locations = {"disk": str(Path(folder, "run")), "s3": f"s3://{BUCKET}/run"}
        with mock.patch.dict(os.environ, {"CATGAN_CACHE": folder}):
            storages = {name: open_storage(location) for name, location in locations.items()}
        savers = {name: Saver(storage, _fail, lambda names: None) for name, storage in storages.items()}
        for storage in storages.values():
            storage.make()
        steps: list[float] = []
        held: dict[str, list[float]] = {name: [] for name in locations}
        saving: dict[str, list[float]] = {name: [] for name in locations}
        for i in range(a.repeats + 1):
            for name, saver in savers.items():
                began = time.process_time()
                gan.step(reals, 10**9, reals if gan.fresh_reals else None)
                steps.append((time.process_time() - began) * config.batch / batch)
                state = {"nimg": i, "config": config.to_dict(), **gan.state_dict()}
                thread_began, began = time.thread_time(), time.process_time()
                saver.save(i, state)
                held[name].append(time.thread_time() - thread_began)
                saver.finish()
                saving[name].append(time.process_time() - began)
        checkpoint = Path(locations["disk"], storages["disk"].checkpoints()[-1])
        megabytes = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6
    tick, snapshot, _ = plan(config)
    tick_s = tick * statistics.median(steps[1:]) / torch.get_num_threads()  # the first of each warms up
    results = [_row(name, held[name][1:], saving[name][1:], tick_s, snapshot / tick) for name in locations]
    table(tuple(results[0]), [tuple(r.values()) for r in results])
    return {
        "recipe": config.recipe,
        "megabytes": round(megabytes, 1),
        "results": results,
        "share": max(r["share"] for r in results),
        "machine": machine(),
    }


def _row(where: str, held: list[float], saving: list[float], tick_s: float, ticks: float) -> dict[str, Any]:
    """The medians of one location; ``ticks`` are those between two snapshots."""
    held_s, saving_s = statistics.median(held), statistics.median(saving)
    return {
        "where": where,
        "held_ms": round(1e3 * held_s, 2),
        "saving_s": round(saving_s, 3),
        "tick_s": round(tick_s, 2),
        "share": round(held_s / tick_s, 5),
        "share_cpu": round(saving_s / (tick_s * ticks), 5),
    }


def _fail(problem: str) -> None:
    raise RuntimeError(problem)


@contextmanager
def _s3() -> Iterator[None]:
    """A bucket on a server on this machine; the environment points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
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


if __name__ == "__main__":
    run_command("checkpoint.py", main)
