"""A sweep on a real cluster of two nodes survives the loss of one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import local

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0

pytestmark = [pytest.mark.ray, pytest.mark.soak]


def records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal that may be in use."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def trials_of(processes: list[psutil.Process]) -> set[str]:
    """The trials that one of the processes trains: it writes their messages."""
    found = set()
    for process in processes:
        try:
            files = [Path(file.path) for file in process.open_files()]
        except psutil.Error:
            continue
        found |= {file.parent.name for file in files if file.name == "log.txt"}
    return found


def test_a_trial_on_a_lost_node_continues_on_another(shards: Path, sandbox: Any):
    started = sandbox.start("--nodes", "2", "--cpus", "1")
    assert started.returncode == 0, started.stdout
    found = local.Cluster.load(sandbox.home / "c")
    assert found is not None
    head, other = found.nodes
    out, log = sandbox.home / "out", sandbox.home / "sweep.log"
    command = [sys.executable, str(ROOT / "trainer" / "sweep.py"), "dcgan-cpu-32", "--data", str(shards)]
    command += ["--out", str(out), "--name", "s", "--eval.extractor", "efflite0", "--eval.num", "32", "--batch", "8"]
    command += ["--model.g-width", "4", "--model.d-width", "4", "--track.tick-kimg", "0.064", "--track.offline"]
    command += ["--try", "optim.g-lr=1e-4,1e-3", "--kimg", "6.4", "--track.snapshot-kimg", "0.64", "--reduction", "0"]
    command += ["--confirm", "0", "--cpus-per-trial", "1"]
    env = sandbox.env | {"RAY_ADDRESS": f"127.0.0.1:{sandbox.port}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
        )
    try:
        journal = out / "s" / "sweep.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        lost: set[str] = set()
        while not lost or not lost <= {r["name"] for r in records(journal) if r["kind"] == "point"}:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
            lost = trials_of(local._processes(other))
        assert len(lost) == 1, "a trial on each node"
        assert trials_of(local._processes(head)) == {"t00", "t01"} - lost
        for one in local._processes(other):
            one.kill()
        result, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
    said = log.read_text()
    assert process.returncode == 0, said
    assert json.loads(result)["trials"] == {"done": 2, "stopped": 0, "failed": 0, "waiting": 0}, said
    (name,) = lost
    assert f"{name}: its process was lost" in said
    assert "Traceback" not in said
    assert "continuing from" in (out / "s" / name / "log.txt").read_text()
    points = [(r["name"], r["kimg"]) for r in records(journal) if r["kind"] == "point"]
    assert len(points) == len(set(points)) == 20, "nothing is measured twice"
