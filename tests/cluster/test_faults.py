"""A training on a real cluster of two nodes survives kills of workers, nodes, driver and head.

One training has all of these faults, since the state after one fault must not break the recovery from the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from cluster import local
from tests.processes import training_workers

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
TICK, SNAPSHOT = 16, 512  # images
DRAIN_S = 60  # between a preemption request and its deadline

OPTIONS = [
    *("--workers", "1:2", "--eval.extractor", "efflite0", "--eval.num", "256", "--batch", "8", "--precision", "fp32"),
    *("--model.g-width", "8", "--model.d-width", "8", "--loader.workers", "0"),
    *("--track.tick-kimg", str(TICK / 1000), "--track.snapshot-kimg", str(SNAPSHOT / 1000)),
]

pytestmark = [pytest.mark.ray, pytest.mark.soak]


class Nodes:
    """The sandbox's cluster: a head and another node with one CPU each."""

    def __init__(self, sandbox: Any) -> None:
        self.sandbox, self.folder = sandbox, sandbox.home / "c"
        self.more: list[local.Node] = []

    def start(self) -> None:
        started = self.sandbox.start("--nodes", "2", "--cpus", "1")
        assert started.returncode == 0, started.stdout

    def add(self) -> None:
        """Start another node, as on a machine that joins."""
        ray = Path(sys.executable).with_name("ray")
        command = [ray, "start", "--block", "--num-cpus=1", "--num-gpus=0", f"--address=127.0.0.1:{self.sandbox.port}"]
        command += [f"--temp-dir={self.sandbox.home / 'r2'}", f"--object-store-memory={local.OBJECT_STORE_BYTES}"]
        with (self.sandbox.home / "node.log").open("wb") as log:
            node = subprocess.Popen(command, env=self.sandbox.env, stdout=log, stderr=log, start_new_session=True)
        self.more.append(local.Node(node.pid, psutil.Process(node.pid).create_time()))

    def processes(self) -> list[list[psutil.Process]]:
        """The processes of each node, the head first."""
        found = local.Cluster.load(self.folder)
        assert found is not None
        return [local._processes(node) for node in (*found.nodes, *self.more)]

    def workers(self) -> list[psutil.Process]:
        """The training workers."""
        return training_workers(process for node in self.processes() for process in node)

    def live(self) -> dict[str, bool]:
        """The ids of the nodes that are alive -> whether it is the head."""
        listed = self.sandbox.run("ray", "list", "nodes", "--format=json", "--filter=state=ALIVE")
        return {node["node_id"]: node["is_head_node"] for node in json.loads(listed.stdout[listed.stdout.index("[") :])}


class Training:
    """``trainer/run.py`` on the cluster, restarted with the same name."""

    def __init__(self, nodes: Nodes, shards: Path) -> None:
        self.nodes, self.out = nodes, nodes.sandbox.home / "out"
        self.run_dir, self.log = self.out / "a", nodes.sandbox.home / "train.log"
        self.command = [sys.executable, str(ROOT / "trainer" / "run.py"), "--data", str(shards), "--out", str(self.out)]
        self.command += ["--name", "a", *OPTIONS]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, kimg: float) -> None:
        env = self.nodes.sandbox.env | {"RAY_ADDRESS": f"127.0.0.1:{self.nodes.sandbox.port}", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--kimg", str(kimg)],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def latest(self) -> int:
        """Position of the latest checkpoint in images."""
        return max((int(p.parent.name[-12:]) for p in self.run_dir.glob("checkpoint_*/checkpoint.json")), default=0)

    def lines(self) -> list[dict[str, Any]]:
        try:
            text = (self.run_dir / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def is_evaluating(self) -> bool:
        """Whether the tick of a snapshot is recorded, but not yet its metric."""
        last = self.lines()[-1]
        return last["nimg"] % SNAPSHOT == 0 and "fd256_efflite0" not in last

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, f"ended before {what}: {self.output()[-4000:]}"
            assert time.monotonic() < deadline, f"no {what}: {self.output()[-4000:]}"
            time.sleep(0.05)

    def wait_for_checkpoint(self, after: str) -> None:
        before = self.latest()
        self.wait_for(lambda: self.latest() > before, f"checkpoint after {after}")


def kill(*processes: psutil.Process) -> None:
    """Kill the processes and wait until they have ended."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


@pytest.fixture(scope="module")
def nodes(sandbox: Any) -> Iterator[Nodes]:
    cluster = Nodes(sandbox)
    cluster.start()
    try:
        yield cluster
    finally:
        for node in cluster.more:
            kill(*local._processes(node))


@pytest.fixture
def training(nodes: Nodes, shards: Path) -> Iterator[Training]:
    started = Training(nodes, shards)
    try:
        yield started
    finally:
        if started.process is not None and started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


@pytest.mark.timeout(1500)
def test_a_training_survives_its_workers_nodes_driver_and_head(training: Training, nodes: Nodes) -> None:
    training.start(kimg=1000)
    training.wait_for_checkpoint("the start")

    training.wait_for(training.is_evaluating, "evaluation")
    kill(nodes.workers()[-1])
    assert training.is_evaluating(), "the kill came after the evaluation"
    training.wait_for_checkpoint("the loss of a worker in an evaluation")
    assert "warning: lost worker" in training.output()
    assert "Traceback" not in training.output()

    kill(*nodes.workers())
    training.wait_for_checkpoint("the loss of both workers")

    kill(*nodes.processes()[1])
    training.wait_for_checkpoint("the loss of a node")
    assert "on 1 worker," in training.output()

    starts = training.output().count("on 2 workers,")
    nodes.add()
    training.wait_for(lambda: training.output().count("on 2 workers,") > starts, "second worker on the new node")
    training.wait_for_checkpoint("the growth")

    (leaving,) = (node for node, is_head in nodes.live().items() if not is_head)
    drain = ["--node-id", leaving, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = time.time() + DRAIN_S
    drained = nodes.sandbox.run(
        *("ray", "drain-node", "--address", f"127.0.0.1:{nodes.sandbox.port}", *drain),
        *("--deadline-remaining-seconds", str(DRAIN_S)),
    )
    assert drained.returncode == 0, drained.stdout
    said = r"a machine is about to leave the cluster: checkpoint at ([\d.]+) kimg"
    training.wait_for(lambda: re.search(said, training.output()), "checkpoint at the preemption request")
    position = round(float(re.findall(said, training.output())[-1]) * 1000)
    training.wait_for(lambda: training.latest() >= position, "end of its saving")
    assert time.time() < deadline, "the deadline of the preemption had passed"

    assert training.process is not None
    training.process.send_signal(signal.SIGTERM)
    assert training.process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    assert "stopped after a checkpoint" in training.output()

    training.start(kimg=1000)
    training.wait_for_checkpoint("SIGTERM")
    kill(psutil.Process(training.process.pid))  # the driver, then everything else
    training.process.wait()
    kill(*(process for node in nodes.processes() for process in node))
    nodes.more.clear()
    nodes.start()
    end = training.latest() + 2 * SNAPSHOT
    training.start(kimg=end / 1000)
    stdout, _ = training.process.communicate(timeout=TIMEOUT_S)
    assert training.process.returncode == 0, training.output()[-4000:]

    result = json.loads(stdout)
    assert result["kimg"] * 1000 == end
    assert Path(result["onnx"]).is_file()
    check_records(training, result, end)


def check_records(training: Training, result: dict[str, Any], end: int) -> None:
    """There is one MLflow run, without missing points."""
    ticks = [line["nimg"] for line in training.lines() if "loss/generator" in line]
    assert ticks == list(range(TICK, end + 1, TICK))
    client = MlflowClient(f"sqlite:///{training.out / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("catgan").experiment_id])
    assert run.info.run_id == result["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, "loss/generator"))
    expected = Counter(nimg // 1000 for nimg in ticks)
    # Another number of workers repeats points with other values, which are logged again.
    assert steps.keys() == expected.keys()
    assert all(steps[step] >= number for step, number in expected.items())
