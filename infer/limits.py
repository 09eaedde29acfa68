"""Checks a graph's operators and the work per image before it runs.

A generator is a feed-forward graph of ordinary operators. These are listed here, and all others are refused: loops and
branches, custom operators, random numbers (``z`` is the only source of randomness), text, sequences. The output shapes
of the listed operators follow from the graph alone. onnxruntime infers them for one image without computing anything,
and their total size is bounded. Otherwise a file of 200 bytes could ask for terabytes, even when it is opened, since
constants are computed then.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from catgan.command import UserError
from infer.onnxfile import ModelFile, Node, rank_of

# Per image, over all computed tensors. ProGAN at 1024 pixels has 2**28 and 2**37.
MAX_VALUES = 2**30
MAX_OPERATIONS = 2**40  # multiply-adds; half a minute to a minute on 2 CPU cores

_LISTED = (
    # Element by element
    "Abs Add And Cast CastLike Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu "
    "Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Where "
    # Sums of products, normalisation, reduction
    "Conv ConvTranspose Gemm MatMul BatchNormalization GroupNormalization InstanceNormalization LayerNormalization "
    "LpNormalization RMSNormalization LogSoftmax Softmax AveragePool GlobalAveragePool GlobalMaxPool MaxPool "
    "ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare "
    # Shapes
    "Concat Constant ConstantOfShape DepthToSpace Expand Flatten Gather OneHot Pad Reshape Resize Shape Slice "
    "SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Upsample "
    # Integers instead of floats
    "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear"
)
OPERATORS = frozenset(_LISTED.split())


def check_operators(model: ModelFile, path: Path) -> None:
    """Raise ``UserError`` if the graph has an operator that is not in ``OPERATORS``."""
    for node in model.nodes:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            name = f"{node.domain}.{node.op_type}".strip(".")[:80]
            raise UserError(
                f"{path}: has the operator {name!r}, which is refused: a generator is made of ordinary, deterministic "
                "ONNX operators without loops; make it with catexport"
            )


def check_work(model: ModelFile, outline: Any, path: Path) -> int:
    """The number of values that are computed for one image. ``outline`` is an InferenceSession of ``model.outline``.

    Raises:
        UserError: it is above ``MAX_VALUES``, the multiply-adds are above ``MAX_OPERATIONS``, or a shape is unknown.
    """
    tensors = (*outline.get_inputs(), *outline.get_outputs())
    shapes = dict(model.shapes)
    for tensor in tensors:
        if tensor.type == "tensor(string)":
            raise UserError(f"{path}: computes with text, which is refused; make it with catexport")
        shapes[tensor.name] = _shape(tensor, path)
    values = sum(math.prod(shape) for shape in shapes.values())
    operations = workspace = 0
    for node in model.nodes:
        cost, buffer = _cost(node, shapes)
        operations += cost
        workspace = max(workspace, buffer)
    values += workspace
    if values > MAX_VALUES or operations > MAX_OPERATIONS:
        raise UserError(
            f"{path}: one image takes {values:.1e} values and {operations:.1e} multiply-adds, allowed are "
            f"{MAX_VALUES:.1e} and {MAX_OPERATIONS:.1e}"
        )
    return values


def _shape(tensor: Any, path: Path) -> list[int]:
    """The dimensions of an input or output of a session.

    They are read from its text form, since its attribute ``shape`` keeps only 32 bits of each (onnxruntime 1.31.1:
    2**32 + 1 becomes 1).
    """
    dims = str(tensor).rpartition("shape=[")[2].rpartition("]")[0]
    try:
        shape = [int(dim) for dim in dims.split(",") if dim]
    except ValueError:
        shape = [-1]
    if min(shape, default=0) < 0:
        raise UserError(
            f"{path}: the shape of {tensor.name.removeprefix(rank_of(''))[:40]!r} is only known when it runs, which is "
            "refused; export it with fixed shapes but for the batch"
        )
    return shape


def _cost(node: Node, shapes: dict[str, list[int]]) -> tuple[int, int]:
    """(multiply-adds, buffer) of one operator; the buffer is the number of values it may need besides its output
    (im2col)."""
    inputs = [shapes[name] for name in node.inputs if name]
    outputs = [shapes[name] for name in node.outputs if name]
    read, written = (sum(math.prod(shape) for shape in group) for group in (inputs, outputs))
    out = math.prod(outputs[0]) if outputs else 0
    match node.op_type:
        case "Conv" | "ConvInteger" | "QLinearConv":
            # Each weight is used at each position. The weights are input 1, of QLinearConv input 3; the largest input
            # is an upper bound.
            weights = max(inputs[1:], key=math.prod)
            positions = math.prod(outputs[0][2:])
            return (
                outputs[0][0] * positions * math.prod(weights),
                positions * inputs[0][1] * math.prod(weights[2:]),
            )
        case "ConvTranspose":
            positions = math.prod(inputs[0][2:])
            cost = inputs[0][0] * positions * math.prod(inputs[1])
            return cost, cost // max(inputs[0][1], 1)
        case "MatMul" | "MatMulInteger" | "QLinearMatMul":
            return out * (inputs[0][-1] if inputs[0] else 1), 0
        case "Gemm":
            return outputs[0][1] * math.prod(inputs[0]), 0
        case "AveragePool" | "MaxPool":
            return out * node.kernel_area, 0
        case "Resize" | "Upsample":
            return 16 * out, 0  # a cubic filter's taps
    # An input that is read twice counts twice, since onnxruntime adds up the sizes of Concat's inputs in 32 bits.
    return read + written, read
