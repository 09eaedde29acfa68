"""Tiny ONNX generators made with the ``onnx`` package: z, Cast, MatMul, Reshape, ConvTranspose, Tanh, image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Z_DIM, SIZE = 16, 8


def build(
    *,
    z: str = "z",
    image: str = "image",
    batch: str | int = "batch",
    channels: int = 3,
    z_type: int = TensorProto.FLOAT,
    scale: float = 1.0,
    rows: int = -1,
    opset: int = 17,
    ir_version: int = 8,
    domain: str = "",
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """A generator of 8x8 images; each argument makes it invalid in one way."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((Z_DIM, 4 * 4 * 4)),
        "k": rng.standard_normal((4, channels, 4, 4)) * scale / 8,
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([rows, 4, 4, 4]), "shape"))
    nodes = [
        helper.make_node("Cast", [z], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["floats", "w"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["small"]),
        helper.make_node("ConvTranspose", ["small", "k"], ["large"], kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Tanh", ["large"], [image], domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info(z, z_type, [batch, Z_DIM])],
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, [batch, channels, SIZE, SIZE])],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    helper.set_model_props(model, {"z_dim": str(Z_DIM), "size": str(SIZE)} if metadata is None else metadata)
    return model


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No MLflow server of whoever runs the tests: ``catinfer --list`` would ask it."""
    for name in ("REGISTRY_URI", "TRACKING_URI", "TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture
def make_onnx(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: object) -> Path:
        path = tmp_path / "gen.onnx"
        path.write_bytes(build(**changes).SerializeToString())
        return path

    return make


@pytest.fixture
def onnx_file(make_onnx: Callable[..., Path]) -> Path:
    return make_onnx()


@pytest.fixture(scope="session")
def build_onnx() -> Callable[..., bytes]:
    """``build`` as the content of a file, for fixtures of a whole module."""
    return lambda **changes: build(**changes).SerializeToString()
