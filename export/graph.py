"""From a PyTorch generator to an ONNX graph with nothing in it that pictures do not need."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common as passes
from onnxscript import ir, optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# The oldest pair that has everything the networks need: read by onnxruntime 1.15 and later (see docs/onnx.md).
OPSET = 18
IR_VERSION = 8


class Clamped(nn.Module):
    """The generator with its pictures kept in [-1, 1]; not every architecture ends in a tanh."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).clamp(-1.0, 1.0)


def to_graph(module: nn.Module, z_dim: int) -> onnx.ModelProto:
    """``z`` float32 [batch, z_dim] -> ``image``, any batch; batch norm folded, constants computed.

    Args:
        module: in evaluation mode, on the CPU. Left as it is.
    """
    # Batch 2 as the example: sizes 0 and 1 would be taken for constants (pytorch#148886).
    example = torch.zeros(2, z_dim)
    program = torch.onnx.export(
        _without_batch_norm(module),
        (example,),
        input_names=["z"],
        output_names=["image"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    _simplify(program.model)
    model = program.model_proto
    _strip(model)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "catgan", ""
    return model


def _without_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in which batch norm that follows a convolution, or a dense layer reshaped to maps, is part of it."""
    module = copy.deepcopy(module)
    for layers in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        for (name, layer), (norm_name, norm) in pairwise(list(layers.named_children())):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                fused = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
                setattr(layers, name, fused)
            elif isinstance(layer, nn.Sequential) and isinstance(layer[-1], nn.Unflatten):
                _fold_into_linear(layer[-2], norm)
            else:
                continue
            setattr(layers, norm_name, nn.Identity())
    return module


def _fold_into_linear(linear: nn.Module, norm: nn.BatchNorm2d) -> None:
    """``linear`` makes ``norm``'s channels one after the other, each with all its pixels."""
    assert isinstance(linear, nn.Linear)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    pixels = linear.out_features // norm.num_features
    scale, shift = scale.repeat_interleave(pixels), shift.repeat_interleave(pixels)
    bias = shift if linear.bias is None else linear.bias * scale + shift
    linear.weight = nn.Parameter(linear.weight * scale[:, None], requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)


_RULES = [
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
]


def _simplify(model: ir.Model) -> None:
    """Not by the exporter's own optimiser: it takes an addition of 1e-8 for none (seen with onnxscript 0.7.2), without
    which pixel norm divides by zero, and leaves constants of more than 8,192 values uncomputed."""
    for _ in range(3):  # what the rules leave can be computed in turn
        optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize
        )
        RewritePass(_RULES)(model)
    ir.passes.Sequential(
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.NameFixPass(),
    )(model)


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its source: stack traces with this machine's paths, in fields that IR
    version 8 does not have."""
    assert not model.functions
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in graph.initializer), "external data"
    assert {opset.domain for opset in model.opset_import} == {""}, "operators outside the standard"


def append_uint8(model: onnx.ModelProto) -> None:
    """Have ``image`` be uint8 [batch, size, size, 3], rounded exactly as ``infer.grid.to_uint8`` rounds."""
    graph = model.graph
    (image,) = graph.output
    rename_output(graph, "image_float")
    for name, value in (("one", 1.0), ("half_range", 127.5)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    graph.node.extend(
        [
            helper.make_node("Add", ["image_float", "one"], ["image_from_0"]),
            helper.make_node("Mul", ["image_from_0", "half_range"], ["image_to_255"]),
            helper.make_node("Round", ["image_to_255"], ["image_rounded"]),
            helper.make_node("Cast", ["image_rounded"], ["image_8_bit"], to=TensorProto.UINT8),
            helper.make_node("Transpose", ["image_8_bit"], ["image"], perm=[0, 2, 3, 1]),
        ]
    )
    batch, channels, height, width = image.type.tensor_type.shape.dim
    shape = [d.dim_param or d.dim_value for d in (batch, height, width, channels)]
    image.CopyFrom(helper.make_tensor_value_info("image", TensorProto.UINT8, shape))


def rename_output(graph: onnx.GraphProto, name: str) -> None:
    """Have what computes the graph's output call it ``name``; the output itself keeps its name."""
    (output,) = graph.output
    for node in graph.node:
        for names in (node.input, node.output):
            for i, old in enumerate(names):
                if old == output.name:
                    names[i] = name
