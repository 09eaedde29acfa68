from __future__ import annotations

from pathlib import Path

import pytest

from catgan.machine import cores
from infer import benchmark
from infer.cli import main
from infer.session import CPU


def test_tells_the_speed_of_each_batch(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SECONDS", 0)
    result = main(["--onnx", str(onnx_file), "--benchmark", "--device", "cpu"])
    assert (result["onnx"], result["provider"], result["threads"]) == (str(onnx_file), CPU, cores())
    assert list(result["pictures_per_second"]) == ["1", "16", "256"]
    assert min(result["pictures_per_second"].values()) > 0
    assert sum(3 * int(b) / s for b, s in result["pictures_per_second"].items()) < 2 * result["seconds"] + 1
