"""The load of machines and GPUs under MLflow's names for system metrics."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pynvml import NVMLError

from trainer.distributed.load import Load
from trainer.loop import _Training


def test_a_cpu_has_processor_and_memory():
    values = Load(torch.device("cpu"), 0).read()
    assert values.keys() == {"cpu_utilization_percentage", "system_memory_usage_megabytes"}


@pytest.mark.parametrize("utilisation", [{"return_value": 83}, {"side_effect": NVMLError(3)}])
def test_each_rank_reads_its_gpu_and_the_first_the_machine(utilisation: dict):
    cuda = {"mem_get_info": mock.Mock(return_value=(3e9, 8e9)), "utilization": mock.Mock(**utilisation)}
    with mock.patch.multiple("torch.cuda", **cuda):
        first, second = (Load(torch.device("cuda", rank), rank).read() for rank in (0, 1))
    assert "cpu_utilization_percentage" in first
    known = {"gpu_1_utilization_percentage": 83.0} if "return_value" in utilisation else {}
    assert second == {"gpu_1_memory_usage_megabytes": 5000.0, **known}


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([(0, {"cpu": 1.0}), (0, {"gpu_1": 2.0})], {"system/cpu": 1.0, "system/gpu_1": 2.0}),
        ([(0, {"cpu": 1.0}), (1, {"cpu": 2.0})], {"system/node_0/cpu": 1.0, "system/node_1/cpu": 2.0}),
    ],
)
def test_machines_are_told_apart_if_there_are_several(readings: list, expected: dict):
    training = SimpleNamespace(context=SimpleNamespace(node=0), load=mock.Mock())
    with mock.patch("trainer.loop.gather", return_value=readings):
        assert _Training._load(training) == expected  # type: ignore[arg-type]
