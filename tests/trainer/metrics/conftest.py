"""Fixtures for tests of metrics: folders of random images, and a small generator as an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _isolated(isolated_cache: None) -> None:
    """All tests of metrics use a cache of their own and no network."""


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders of random PNG files, brighter by ``shift``."""

    def make(name: str, num: int, size: int = 16, shift: int = 0, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        for i in range(num):
            pixels = rng.integers(0, 200, (size, size, 3)) + shift
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i:05d}.png")
        return tmp_path / name

    return make


@pytest.fixture
def generator_file(tmp_path: Path) -> Path:
    """A generator of 16x16 images as an ONNX file: z [n, 8] -> matrix product -> tanh."""
    matrix = np.random.default_rng(0).standard_normal((8, 3 * 16 * 16)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["z", "matrix"], ["flat"]),
            helper.make_node("Reshape", ["flat", "shape"], ["pixels"]),
            helper.make_node("Tanh", ["pixels"], ["image"]),
        ],
        "generator",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(np.array([-1, 3, 16, 16]), "shape")],
    )
    path = tmp_path / "gen.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
