"""Ray's scheduling of GPUs, with GPUs that exist in its books only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.recipes import resolve

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = """
import json, os, sys
from unittest import mock

import ray
import ray.train
import ray.train.torch

from trainer.data.stream import share
from trainer.launch import ray as launch
from trainer.launch.connect import resource_unit
from trainer.launch.worker import Job

folder, config = sys.argv[1], json.loads(sys.argv[2])


def worker(values):
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    found = {
        "gpus": ray.get_gpu_ids(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "share": share(values["job"]["config"]["batch"], rank, world_size),
        "cpus": ray.get_runtime_context().get_assigned_resources().get("CPU", 0),
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    return {"status": "done", "message": ""}


ray.init(num_cpus=4, num_gpus=2, include_dashboard=False)
backends, Torch = [], ray.train.torch.TorchConfig


def torch_config(backend):
    backends.append(backend)
    return Torch(backend="gloo")  # NCCL needs real GPUs


with mock.patch.object(launch, "_ray_worker", worker), mock.patch("ray.train.torch.TorchConfig", torch_config):
    outcome = launch.run_on_ray(Job(config, None, f"{folder}/run", "", "id", None), 2)
print(json.dumps({"backends": backends, "unit": resource_unit(), "status": outcome.status}))
"""


def test_each_worker_gets_a_gpu_of_its_own_and_its_share_of_the_batch(tmp_path: Path) -> None:
    config = resolve("r3gan-64", None, gpu=True).to_dict()
    home = Path(__file__).parents[3]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(home)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"backends": ["nccl"], "unit": "GPU", "status": "done"}
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert sorted(first["gpus"] + second["gpus"]) == [0, 1]
    # Ray Train shows all GPUs of a machine to each of its workers there, and gives each its own device.
    assert first["visible"] == second["visible"] == "0,1"
    assert [first["share"], second["share"]] == [[0, 128], [128, 256]]
