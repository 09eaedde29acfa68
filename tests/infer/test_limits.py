"""Graphs that take too much memory or work are refused by their shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from catgan.command import UserError
from infer import limits
from infer.limits import check_operators, check_work
from infer.onnxfile import read_model
from infer.session import Generator, open_outline

Change = Callable[[onnx.ModelProto], None]


def changed(path: Path, change: Change) -> Path:
    model = onnx.load_model(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def filled(*dims: int) -> Change:
    """A constant of the shape ``dims`` beside the graph. onnxruntime would compute it when it opens the model."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(dims), "dims"))
        model.graph.node.append(helper.make_node("ConstantOfShape", ["dims"], ["filled"]))

    return change


def doubled(model: onnx.ModelProto) -> None:
    last = "image"
    for i in range(40):
        model.graph.node.append(helper.make_node("Concat", [last, last], [f"double{i}"], axis=1))
        last = f"double{i}"


def concatenated(model: onnx.ModelProto) -> None:
    """The same input many times: in 32 bits the sum of the sizes overflows to a small number."""
    filled(2**26, 1)(model)
    model.graph.node.append(helper.make_node("Concat", ["filled"] * 64, ["many"], axis=0))


def convolved(model: onnx.ModelProto) -> None:
    """Little memory but endless work: a kernel of the size of its image, with padding."""
    filled(1, 1, 2**13, 2**13)(model)
    pads = [2**12, 2**12, 2**12 - 1, 2**12 - 1]
    model.graph.node.append(helper.make_node("Conv", ["filled", "filled"], ["convolved"], pads=pads))


def from_latents(model: onnx.ModelProto) -> None:
    """A shape, and its rank, that depend on z."""
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["z"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Squeeze", ["whole"], ["dims"]),
            helper.make_node("ConstantOfShape", ["dims"], ["filled"]),
        ]
    )


def wide_latents(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w2", TensorProto.FLOAT, [2**40]))


def text(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["image"], ["text"], to=TensorProto.STRING))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (filled(2**20, 2**20), r"one image takes 1\.1e\+12 values"),
        (filled(2**32 + 1), r"one image takes 4\.3e\+09 values"),
        (filled(2**62), "one image takes"),
        (doubled, "one image takes|only known when it runs"),
        (concatenated, r"one image takes 4\.\de\+09 values"),
        (convolved, r"and 4\.5e\+15 multiply-adds"),
        (from_latents, "the shape of '(dims|filled)' is only known when it runs"),
        (wide_latents, "one image takes 1.1e.12 values"),
        (text, "computes with text"),
    ],
)
def test_too_much_work_is_refused_before_anything_is_computed(onnx_file: Path, change: Change, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Generator(changed(onnx_file, change), "cpu")
    assert len(str(caught.value)) < 400


def test_work_below_the_limit_is_allowed(onnx_file: Path) -> None:
    generator = Generator(changed(onnx_file, filled(2**20)), "cpu")
    assert len(generator(np.zeros((1, generator.z_dim), np.float32))) == 1


@pytest.mark.parametrize("op_type", ["Loop", "If", "Scan", "RandomNormal", "NonZero", "StringNormalizer", "NoSuch"])
def test_other_operators_are_refused(onnx_file: Path, op_type: str) -> None:
    path = changed(onnx_file, lambda model: model.graph.node.append(helper.make_node(op_type, ["z"], ["o"])))
    with pytest.raises(UserError, match=f"has the operator {op_type!r}, which is refused"):
        check_operators(read_model(path), path)


def test_every_listed_operator_exists() -> None:
    assert {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain} >= limits.OPERATORS


def test_the_work_is_counted(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tiny generator: z [1, 16] @ w [16, 64]; 3 kernels of 4x4 at 4x4 positions of 4 channels."""
    model = read_model(onnx_file)
    outline = open_outline(onnxruntime, model.outline, onnx_file)
    matmul, convolution = 16 * 64, 16 * (4 * 3 * 4 * 4)
    cast, reshape, tanh = 2 * 16, 64 + 4 + 64, 2 * 3 * 8 * 8
    operations = matmul + convolution + cast + reshape + tanh
    monkeypatch.setattr(limits, "MAX_OPERATIONS", operations)
    check_work(model, outline, onnx_file)
    monkeypatch.setattr(limits, "MAX_OPERATIONS", operations - 1)
    with pytest.raises(UserError, match="one image takes"):
        check_work(model, outline, onnx_file)
