"""One training for ``torchrun.py``, through Ray Train or as a process of torchrun; by itself it is of no use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.launch import worker as launch


class TorchrunContext:
    """What the loop needs to know of the world, without Ray: a process group, and nobody who asks for anything."""

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")

    def notice(self) -> None:
        return None

    def report(self, metrics: dict[str, Any]) -> None:
        dist.barrier()


def main(job_file: str, way: str, workers: str) -> None:
    job = launch.Job(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    if way == "ray":
        # A Ray of as many CPUs as workers gives each of them one thread; it counts with this function.
        launch.cores = lambda: int(workers)
        launch.run_on_ray(job, int(workers))
    else:
        torch.set_num_threads(1)
        launch.work(job, TorchrunContext())
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
