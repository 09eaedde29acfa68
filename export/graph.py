"""Convert a PyTorch generator to a small ONNX graph: batch norm folded, constants computed, no exporter metadata."""

from __future__ import annotations

import copy
import sys
import warnings
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

# The oldest versions with all operators of the networks; onnxruntime reads them from 1.15 on (see docs/onnx.md).
OPSET = 18
IR_VERSION = 8


class Clamped(nn.Module):
    """The generator with its output clamped to [-1, 1], because not every architecture ends in a tanh.

    ``forward`` takes ``label``, int64 ``[n]``, if the generator has ``classes``, and ``psi``, a scalar, if it
    ``truncates``.
    """

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.truncates = bool(getattr(generator, "truncates", False))
        self.classes: tuple[str, ...] = tuple(getattr(generator, "classes", ()))

    def forward(self, z: Tensor, label: Tensor | None = None, psi: Tensor | None = None) -> Tensor:
        given = {"label": label} if self.classes else {}
        given |= {"psi": psi} if self.truncates else {}
        return self.generator(z, **given).clamp(-1.0, 1.0)


def to_graph(module: Clamped, z_dim: int) -> onnx.ModelProto:
    """The graph of ``module`` with input ``z`` float32 ``[batch, z_dim]`` and output ``image``, for any batch size. If
    the module has classes, the input ``label`` follows, int64 ``[batch]``; if it truncates, ``psi``, a float32 scalar.

    Args:
        module: in evaluation mode, on the CPU; not changed.
    """
    # The example has batch size 2: the exporter treats sizes 0 and 1 as constants (pytorch#148886).
    batch = torch.export.Dim("batch")
    example, shapes = {"z": torch.zeros(2, z_dim)}, {"z": {0: batch}}
    if module.classes:
        example["label"], shapes["label"] = torch.zeros(2, dtype=torch.long), {0: batch}
    if module.truncates:
        example["psi"], shapes["psi"] = torch.ones(()), {}
    with warnings.catch_warnings():
        # z and label share the dimension "batch", which the exporter reports.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        program = torch.onnx.export(
            _fold_batch_norm(module),
            kwargs=example,
            input_names=list(example),
            output_names=["image"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _simplify(program.model)
    model = program.model_proto
    _remove_metadata(model)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "catgan", ""
    return model


def _fold_batch_norm(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with batch norm folded into the preceding convolution, or into the preceding linear layer if
    its output is reshaped to feature maps."""
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
    """Fold ``norm`` into ``linear``, whose outputs are the pixels of the first channel, then of the next, and so on."""
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
    """Compute constants and remove redundant nodes.

    The exporter's own optimiser is not used: it removes the addition of 1e-8 that keeps pixel norm from dividing by
    zero (seen with onnxscript 0.7.2), and does not compute constants of more than 8,192 values.
    """
    for _ in range(3):  # the rules produce further constants
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


def _remove_metadata(model: onnx.ModelProto) -> None:
    """Remove the exporter's stack traces, which contain paths of this machine, from fields that IR version 8 lacks."""
    assert not model.functions
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in graph.initializer), "external data"
    assert {opset.domain for opset in model.opset_import} == {""}, "operators outside the standard"


def append_uint8(model: onnx.ModelProto) -> None:
    """Change ``image`` to uint8 ``[batch, size, size, 3]``, rounded exactly as by ``infer.grid.to_uint8``."""
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
    """Rename the tensor of the graph's output to ``name`` in all nodes, so that a new node can compute the output."""
    (output,) = graph.output
    for node in graph.node:
        for names in (node.input, node.output):
            for i, old in enumerate(names):
                if old == output.name:
                    names[i] = name
