"""Export a PyTorch generator to one ONNX file that is checked to generate the same images."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from catgan.command import UserError, say
from catgan.files import atomic_path
from export.graph import OPSET, Clamped, append_uint8, to_graph
from export.precision import to_fp16, to_int8
from infer.latents import latents
from trainer.features.extractors import DISCRIMINATOR_NETWORK
from trainer.features.networks import EFFLITE0

USUAL_ABS_DIFF = 1e-4
"""A larger difference between onnxruntime and PyTorch in fp32, for images in [-1, 1], is reported."""
MAX_ABS_DIFF = 1 / 255
"""From this difference on, half a grey level of 8 bits, a file in fp32 is refused."""
MIN_PSNR = {"fp16": 50, "int8": 20}
"""Smallest allowed peak signal-to-noise ratio in dB; low, to detect broken graphs; the metric tells the quality."""
PARITY_BATCHES = (1, 2, 16)


def metadata(info: Mapping[str, Any]) -> dict[str, str]:
    """The origin of a generator (see ``load_generator``) as metadata of an ONNX file; unknown values are left out."""
    metric = info.get("metric") or {}
    projected = info.get("config", {}).get("projected", {})
    origin = {
        "recipe": info["recipe"],
        "kimg": f"{info['kimg']:g}",
        "metric": metric.get("name"),
        "metric_value": metric.get("value"),
        "metric_n_fake": metric.get("n_fake"),
        "class_counts": metric.get("class_counts"),
        DISCRIMINATOR_NETWORK: EFFLITE0.name if projected.get("weight") else None,
        "run_id": info.get("run_id"),
        "dataset_digest": info.get("dataset_digest"),
    }
    return {key: str(value) for key, value in origin.items() if value is not None}


def weights_sha256(generator: nn.Module) -> str:
    """SHA-256 (hex) over names, types, shapes and values of the state dict, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_onnx(
    generator: nn.Module, path: Path, metadata: Mapping[str, str], precision: str = "fp32", uint8: bool = False
) -> float:
    """Write ``generator`` as one ONNX file and check that onnxruntime generates the same images with it as PyTorch.

    The file has the input ``z`` float32 ``[batch, z_dim]`` and the output ``image`` float32 ``[batch, 3, size, size]``
    in [-1, 1], for any batch size. With ``uint8``, ``image`` is uint8 ``[batch, size, size, 3]``, as ``catinfer``
    computes it from the float image. A generator with ``classes`` gets the input ``label``, int64 ``[batch]``, and the
    entry ``classes`` in its metadata, a JSON list of their names by label. One that ``truncates`` gets the input
    ``psi``, a float32 scalar.

    Args:
        generator: has ``z_dim`` and ``size``; exported in evaluation mode, from any device; not changed.
        path: the file; its folder is made.
        metadata: entries of the file's metadata, see ``metadata``. Those that follow from the network (z_dim, size,
            classes, opset, ir_version, precision, weights_sha256, tools) are added.
        precision: of weights and arithmetic: fp32, fp16 or int8.

    Returns:
        The largest absolute difference of images in [-1, 1] between onnxruntime and PyTorch in fp32, over batches of 1,
        2 and 16 images and the latent of zeros; for a ``psi`` of 1, 0.5 and 0 if it is an input; with all classes.

    Raises:
        UserError: the images differ by half a grey level or more (fp32; for ``uint8``, which is rounded, by a whole
            one), or their peak signal-to-noise ratio is below 50 dB (fp16) or 20 dB (int8); or ``path`` cannot be
            written. ``path`` is then unchanged.
    """
    module = Clamped(copy.deepcopy(generator).cpu().float()).eval().requires_grad_(False)
    z_dim, size = int(module.generator.z_dim), int(module.generator.size)  # type: ignore[arg-type]
    model = to_graph(module, z_dim)
    if precision == "fp16":
        model = to_fp16(model)
    elif precision == "int8":
        model = to_int8(model, z_dim, len(module.classes))
    if uint8:
        append_uint8(model)
    own = {
        "z_dim": str(z_dim),
        "size": str(size),
        "precision": precision,
        "opset": str(OPSET),
        "ir_version": str(model.ir_version),
        "weights_sha256": weights_sha256(module.generator),
        **({"classes": json.dumps(module.classes, ensure_ascii=False)} if module.classes else {}),
        "tools": f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}",
    }
    onnx.helper.set_model_props(model, {**metadata, **own})
    onnx.checker.check_model(model, full_check=True)
    with _replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        largest, rms = _differences(module, temporary, z_dim)
        if problem := _parity_problem(largest, rms, precision, uint8):
            raise UserError(
                f"{path}: onnxruntime {onnxruntime.__version__} and PyTorch {torch.__version__} generate different"
                f" images ({problem}), so nothing was written; check that the weights are finite, or export with other"
                " versions"
            )
    if precision == "fp32" and largest > USUAL_ABS_DIFF + _rounding(uint8):
        say(
            f"warning: images of onnxruntime and PyTorch differ by up to {largest:.1e}, where {USUAL_ABS_DIFF:g} is"
            f" usual; from {MAX_ABS_DIFF:.1e} on, half a grey level, the file would be refused"
        )
    return largest


def annotate(path: Path, entries: Mapping[str, str]) -> None:
    """Add ``entries`` to the metadata of an ONNX file, replacing those of the same names.

    Raises:
        UserError: it cannot be written.
    """
    model = onnx.load(path)
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, **entries})
    with _replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """``atomic_path`` with its OSErrors as UserErrors; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


def _differences(module: Clamped, path: Path, z_dim: int) -> tuple[float, float]:
    """Largest absolute difference of images in [-1, 1] between ``module`` and the file, and the root mean square
    difference relative to that range. NaN if either side has a NaN."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest, squares = [], []
    # catinfer --psi 0 uses the latent of zeros where psi is not an input.
    zs = [*(latents(range(batch), z_dim) for batch in PARITY_BATCHES), np.zeros((1, z_dim), np.float32)]
    num_classes = len(module.classes)
    if num_classes:
        zs += [latents(range(i, min(i + 16, num_classes)), z_dim) for i in range(0, num_classes, 16)]
    psis = [{"psi": np.array(psi, np.float32)} for psi in (1, 0.5, 0)] if module.truncates else [{}]
    label = 0
    for z, psi in itertools.product(zs, psis):
        feed = {"z": z, **psi}
        if num_classes:  # in turn, so that each class is met
            feed["label"] = np.arange(label, label + len(z)) % num_classes
            label += len(z)
        (image,) = session.run(["image"], feed)
        if image.dtype == np.uint8:
            image = image.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(value) for name, value in feed.items()}).numpy()
        assert image.shape == expected.shape, (image.shape, expected.shape)
        largest.append(np.abs(image - expected).max())
        squares.append(np.square((image - expected) / 2).mean())
    return float(np.max(largest)), math.sqrt(np.mean(squares))


def _rounding(uint8: bool) -> float:
    """The largest difference that rounding to pixels makes."""
    return 0.5 / 127.5 if uint8 else 0.0


def _parity_problem(largest: float, rms: float, precision: str, uint8: bool) -> str | None:
    """What is wrong with the results of ``_differences``; None if they are within the limits. NaN is not."""
    if precision == "fp32":
        limit = MAX_ABS_DIFF + _rounding(uint8)
        return None if largest < limit else f"largest difference {largest:g}, allowed is less than {limit:.3g}"
    if rms <= 10 ** (-MIN_PSNR[precision] / 20):
        return None
    psnr = -20 * math.log10(rms) if rms > 0 else math.nan
    return f"{precision}: {psnr:.1f} dB of peak signal-to-noise ratio, needed {MIN_PSNR[precision]}"
