"""Convert the graph of a generator to fp16, or to int8 with scales from calibration."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graph import rename_output
from infer.latents import latents

# Operators of normalisation: sums of squares exceed the largest fp16, 65,504, and 1e-8 becomes 0.
_STAY_FP32 = frozenset({"Pow", "ReduceMean", "Sqrt", "Reciprocal", "Div", "Exp", "Softmax"})
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

_NUM_CALIBRATION = 128  # latents, of seeds that no evaluation uses
_CALIBRATION_SEED = 2**40
_INT8_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert weights and arithmetic to fp16; inputs, ``image`` and normalisation stay in fp32. Changes ``model``."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = model.graph
    declared = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    kinds: dict[str, int] = {v.name: TensorProto.FLOAT for v in graph.input if declared[v.name] in _FLOATS}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}

    def as_kind(name: str, kind: int) -> str:
        """The name of tensor ``name`` as ``kind``; adds a converted weight or a cast if there is none."""
        if name in weights:
            if kind == TensorProto.FLOAT:
                return name
            half = f"{name}.fp16"
            added[half] = numpy_helper.from_array(numpy_helper.to_array(weights[name]).astype(np.float16), half)
            return half
        if kinds.get(name, kind) == kind:
            return name
        cast = f"{name}.{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
        if cast not in kinds:
            nodes.append(helper.make_node("Cast", [name], [cast], to=kind))
            kinds[cast] = kind
        return cast

    rename_output(graph, "image.any")
    declared["image.any"] = declared["image"]
    for node in graph.node:
        # An addition to an fp32 sum is the small constant that keeps it from zero.
        is_guard = node.op_type == "Add" and any(kinds.get(name) == TensorProto.FLOAT for name in node.input)
        kind = TensorProto.FLOAT if is_guard or node.op_type in _STAY_FP32 else TensorProto.FLOAT16
        for i, name in enumerate(node.input):
            is_scale = node.op_type == "Resize" and i > 0  # must be fp32
            node.input[i] = as_kind(name, TensorProto.FLOAT if is_scale else kind)
        nodes.append(node)
        kinds |= {name: kind for name in node.output if declared[name] in _FLOATS}
    nodes.append(helper.make_node("Cast", ["image.any"], ["image"], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [t for t in (*graph.initializer, *added.values()) if t.name in used]
    for field, items in (("node", nodes), ("initializer", kept)):
        graph.ClearField(field)
        getattr(graph, field).extend(items)
    graph.ClearField("value_info")
    return model


def to_int8(model: onnx.ModelProto, z_dim: int, num_classes: int = 0) -> onnx.ModelProto:
    """Quantize convolutions and linear layers to int8, by QuantizeLinear and DequantizeLinear around each of them.

    Weights have a scale per channel, activations one per tensor, from their range over 128 latents.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Latents(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches(z_dim, num_classes, {value.name for value in model.graph.input})

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    logging.getLogger().addFilter(_is_error)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, "int8.onnx")
            quantize_static(
                model,
                target,
                Latents(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_INT8_OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(target)
    finally:
        logging.getLogger().removeFilter(_is_error)


def _batches(z_dim: int, num_classes: int, inputs: set[str]) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, _NUM_CALIBRATION, 16):
        start = _CALIBRATION_SEED + first
        labels = np.arange(first, first + 16) % max(num_classes, 1)
        values = {"z": latents(range(start, start + 16), z_dim), "label": labels, "psi": np.float32(1)}
        yield {name: np.asarray(values[name]) for name in inputs}


def _is_error(record: logging.LogRecord) -> bool:
    """Hides onnxruntime's advice to optimise the model first, which is done already."""
    return record.levelno >= logging.ERROR
