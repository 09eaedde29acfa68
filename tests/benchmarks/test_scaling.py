"""The sums of the model of scaling: formulas with known values and limits, and the work that is counted."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

Script = Callable[[str], ModuleType]


@pytest.fixture
def model(script: Script) -> ModuleType:
    return script("scaling_model")


def test_ring(model: ModuleType) -> None:
    assert model.ring(1e9, 1, 1e9, 1.0) == 0
    assert model.ring(1e9, 2, 1e9, 0.0) == 1  # each sends its half, then the sum of the other one
    assert model.ring(1e9, 4, 1e9, 0.25) == pytest.approx(1.5 + 6 * 0.25)
    assert model.ring(1e9, 10**9, 1e9, 0.0) == pytest.approx(2)  # the limit: all bytes there and back


def test_nodes_exchange_only_their_parts(model: ModuleType) -> None:
    a = model.Assumptions(nvlink_hop=0, network_hop=0)
    inside = model.all_reduce(8e9, 8, a)
    assert inside == pytest.approx(2 * 7 / 8 * 8e9 / a.nvlink)
    assert model.all_reduce(8e9, 16, a) == pytest.approx(inside + 1e9 / a.network)


def test_parts_of_a_step(script: Script, model: ModuleType) -> None:
    work = script("step_work").Work(
        "r3gan", 64, 8, 3_000_000, 1_000_000, 1, flops=1e9, draw_flops=1e8, operations=100, norms=4, reads=2,
        snapshot=1000, judged=500,
    )  # fmt: skip
    a = model.Assumptions(flops=1e12, utilisation=0.5, launch=1e-3, cores_per_gpu=1, decode=100, distance=3)
    parts = model.step_parts(work, 1, 8, a)
    assert parts["compute"] == pytest.approx(8e9 / 0.5e12)
    assert parts["compute"] + parts["launch"] == pytest.approx(0.1)  # 100 operations of 1 ms hide the work of 16 ms
    assert parts["input"] == pytest.approx(16 / 100 - 0.1)  # what reading takes beyond them
    assert parts["gradients"] == parts["norms"] == 0
    assert parts["evaluation"] == pytest.approx((500 * (1e8 + a.judge_flops) / 0.5e12 + 3) * 8 / 1000)
    assert parts["checkpoint"] == pytest.approx(4 * 15e6 / a.pcie * 8 / 1000)
    assert model.step_parts(work, 8, 8, a)["norms"] == pytest.approx(4 * model.all_reduce(4096, 8, a))
    assert model.scaling(work, 1, 8, a)["efficiency"] == 1
    assert 1 > model.scaling(work, 8, 8, a)["efficiency"] > model.scaling(work, 512, 8, a)["efficiency"]


def test_needs_of_input_grow_with_the_pictures(model: ModuleType) -> None:
    few, many = (model.input_needs(n, model.Assumptions()) for n in (10**6, 10**9))
    assert few["shards"] == 1954
    assert few["gb_decoded"] == pytest.approx(12.288)
    assert many["reader_mb"] == pytest.approx(1000 * few["reader_mb"], rel=0.01)
    assert 100 < few["reader_mb"] * 1e6 / few["shards"] < 2000


def test_work_is_counted(script: Script) -> None:
    step_work = script("step_work")
    with step_work.Counter() as counter:
        x = torch.zeros(2, 8, 6, 6, requires_grad=True)
        weight = torch.zeros(4, 2, 3, 3, requires_grad=True)  # in 4 groups
        torch.nn.functional.conv2d(x, weight, groups=4).sum().backward()
    forward = 2 * (2 * 4 * 4 * 4) * (2 * 3 * 3)
    assert counter.flops == 3 * forward  # and as much for the gradient of each operand
    work = step_work.count_work("dcgan-cpu", 32)
    # G draws once; D judges reals and fakes, then fakes again: each forward and back, D's last one to its input only.
    assert work.flops > 6 * work.draw_flops
    assert dataclasses.replace(work, flops=0) == dataclasses.replace(step_work.count_work("dcgan-cpu", 32), flops=0)
    assert work.norms == 2 * (3 + 2 * 2)  # of G's three layers, and of D's two for reals and fakes, for fakes again


def test_fit_finds_latency_and_bandwidth(script: Script) -> None:
    all_reduce = script("all_reduce")
    seconds = [1e-4 + size / 5e8 for size in all_reduce.SIZES]
    assert all_reduce.fit(all_reduce.SIZES, seconds) == pytest.approx((1e-4, 5e8))


def test_cpu_time_of_a_tree_has_the_children(script: Script) -> None:
    cpu_time = script("cpu_time")
    program = "import os; os.fork() or [x for x in range(10**7)]; print(flush=True); input()"
    before = cpu_time.of_tree(os.getpid()), cpu_time.of_machine()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert [child.stdout.readline(), child.stdout.readline()] == [b"\n", b"\n"]
        of_child = cpu_time.of_tree(child.pid)
        after = cpu_time.of_tree(os.getpid()), cpu_time.of_machine()
        child.kill()
    assert 0.05 < of_child <= after[0] - before[0] + 0.05
    assert after[1] - before[1] > 0.05
