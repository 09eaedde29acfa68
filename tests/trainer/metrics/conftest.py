"""What tests of metrics share: a cache of their own, no network, and small files that stand in for large ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from trainer.features.networks import INCEPTION

REAL_WEIGHTS = os.environ.get("CATGAN_INCEPTION_WEIGHTS")


@pytest.fixture(scope="session", autouse=True)
def _own_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("CATGAN_OFFLINE", "1")
        patch.delenv("CATGAN_INCEPTION_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="session")
def inception_weights(request: pytest.FixtureRequest) -> Path:
    """pytorch-fid's weights if CATGAN_INCEPTION_WEIGHTS says where they are, else random ones."""
    return Path(REAL_WEIGHTS) if REAL_WEIGHTS else request.getfixturevalue("random_inception_weights")


@pytest.fixture(scope="session")
def random_inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for InceptionV3, scaled so that activations neither vanish nor explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = INCEPTION.build()
        for parameter in network.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Folders of random pictures, darker or lighter by ``shift``."""

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
    """A generator of random 16x16 pictures: z [n, 8] -> a matrix product -> tanh."""
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
