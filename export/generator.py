"""From a PyTorch generator to one ONNX file that is known to draw the same pictures."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from infer.command import UserError
from infer.latents import latents

MAX_ABS_DIFF = 1e-4
PARITY_BATCHES = (1, 2, 16)

# The oldest pair that has everything the networks need: read by onnxruntime 1.14 (February 2023) and later.
OPSET = 18
IR_VERSION = 8


class _Clamped(nn.Module):
    """The generator with its pictures kept in [-1, 1]; not every architecture ends in a tanh."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).clamp(-1.0, 1.0)


def metadata(info: Mapping[str, Any]) -> dict[str, str]:
    """The origin of a generator, as ``trainer.checkpoint.load_generator`` tells it, in the form ONNX files hold."""
    metric = info.get("metric") or {}
    origin = {
        "recipe": info["recipe"],
        "kimg": f"{info['kimg']:g}",
        "metric": metric.get("name"),
        "metric_value": metric.get("value"),
        "run_id": info.get("run_id"),
        "dataset_digest": info.get("dataset_digest"),
    }
    return {key: str(value) for key, value in origin.items() if value is not None}


def weights_sha256(generator: nn.Module) -> str:
    """SHA-256 (hex) over names, types, shapes and values of the state, whatever file it is kept in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_onnx(generator: nn.Module, path: Path, metadata: Mapping[str, str]) -> float:
    """Write ``generator`` as one ONNX file: ``z`` float32 [batch, z_dim] -> ``image`` float32 [batch, 3, size, size]
    in [-1, 1], any batch, batch norm folded into the convolutions.

    Args:
        generator: has ``z_dim`` and ``size``; exported as in evaluation mode, from any device.
        metadata: more entries for the file, see ``metadata``. Those that follow from the network (z_dim, size,
            opset, precision, weights_sha256, tools) are added.

    Returns:
        The largest absolute difference between onnxruntime and PyTorch over batches of 1, 2 and 16 pictures.

    Raises:
        UserError: the two differ by more than 1e-4, or ``path`` cannot be written. Nothing is left behind.
    """
    module = _Clamped(copy.deepcopy(generator).cpu().float()).eval().requires_grad_(False)
    z_dim, size = int(module.generator.z_dim), int(module.generator.size)  # type: ignore[arg-type]
    model = _to_onnx(module, z_dim)
    own = {
        "z_dim": str(z_dim),
        "size": str(size),
        "precision": "fp32",
        "opset": str(OPSET),
        "weights_sha256": weights_sha256(module.generator),
        "tools": f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}",
    }
    onnx.helper.set_model_props(model, {**metadata, **own})
    onnx.checker.check_model(model, full_check=True)

    with _replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        difference = _max_abs_diff(module, temporary, z_dim)
        if not difference <= MAX_ABS_DIFF:  # not <= rather than >: NaN must not pass
            raise UserError(
                f"{path}: onnxruntime {onnxruntime.__version__} and PyTorch {torch.__version__} draw different"
                f" pictures (largest difference {difference:g}, allowed {MAX_ABS_DIFF:g}), so nothing was written;"
                " check that the weights are finite, or export with other versions"
            )
    return difference


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which becomes ``path`` if all goes well and else disappears."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _to_onnx(module: nn.Module, z_dim: int) -> onnx.ModelProto:
    # Batch 2 as the example: sizes 0 and 1 would be taken for constants (pytorch#148886).
    example = torch.zeros(2, z_dim)
    program = torch.onnx.export(
        module,
        (example,),
        input_names=["z"],
        output_names=["image"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _strip(model)
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name, model.producer_version = "catgan", ""
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its source: stack traces with this machine's paths, in fields that IR
    version 8 does not have."""
    assert not model.functions
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.initializer), "external data"
    assert {opset.domain for opset in model.opset_import} == {""}, "operators outside the standard"


def _max_abs_diff(module: nn.Module, path: Path, z_dim: int) -> float:
    """Over ``PARITY_BATCHES``; NaN if either side has one."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for batch in PARITY_BATCHES:
        z = latents(range(batch), z_dim)
        (image,) = session.run(["image"], {"z": z})
        with torch.no_grad():
            expected = module(torch.from_numpy(z)).numpy()
        assert image.shape == expected.shape, (image.shape, expected.shape)
        differences.append(np.abs(image - expected).max())
    return float(np.max(differences))
