"""The checked ONNX file as a function from latents to images. onnxruntime is imported when a file is opened."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from catgan.command import UserError, say
from catgan.machine import cores
from infer.classes import read_classes
from infer.diagnosis import (
    CPU,
    CUDA,
    INSTALL_CUDA,
    brief,
    import_onnxruntime,
    onnxruntime_errors,
    why_no_cuda,
    why_not_loaded,
)
from infer.grid import to_uint8
from infer.limits import MAX_VALUES, check_operators, check_work
from infer.onnxfile import read_model
from infer.values import DEVICES

# Images per call of onnxruntime. The number is fixed, and the last batch is padded, so that an image does not depend on
# how many others are generated: kernels are chosen by batch size, and dynamic quantization even scales by the batch.
# On CPUs each call computes one image on one thread, and as many calls run at once as there are cores. So nothing
# depends on either number, and no thread waits for another within an image. This is faster than one call with all
# threads and all images (benchmarks/inference.py).
BATCH = {CPU: 1, CUDA: 32}

# TF32 would give other pixel values than the CPU. The default cuDNN search measures the algorithms, so the choice and
# with it the last bits would differ from run to run.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


class Generator:
    """A generator in an ONNX file: latents ``z`` float32 ``[n, z_dim]`` -> images uint8 ``[n, size, size, 3]``.

    An image depends on its ``z``, ``psi``, ``move`` and ``label`` alone, not on ``n``. A graph with the input ``psi``
    truncates an intermediate latent; for others ``z`` is scaled by it. A graph with the input ``label`` is
    class-conditional.

    Args:
        path: the ONNX file.
        device: "cpu", "cuda" (an error if CUDA does not work) or "auto" (CUDA if it works, else the CPU).

    Attributes:
        z_dim: size of a latent.
        size: side of an image in pixels.
        is_uint8: whether the graph itself rounds to pixel values.
        has_psi: whether the graph has the input ``psi``.
        classes: names of the classes by label, see ``infer.classes``; empty if the graph has no input ``label``.
        metadata: the file's text entries.
        sha256: of the file, in hex.
        provider: onnxruntime's name of the device, such as "CPUExecutionProvider".
        device: the same as ``catinfer`` names it, "cpu" or "cuda".

    Raises:
        UserError: the file is not one self-contained generator with input ``z``, maybe ``label`` and ``psi``, and
            output ``image``, its metadata do not fit, or onnxruntime is missing or too old.
    """

    def __init__(self, path: str | PathLike[str], device: str = "auto") -> None:
        assert device in DEVICES, device
        self._path = Path(path)
        model = read_model(self._path)
        check_operators(model, self._path)
        self.sha256 = hashlib.sha256(model.data).hexdigest()
        ort = import_onnxruntime()
        values = check_work(model, open_outline(ort, model.outline, self._path), self._path)
        self._at_once = max(1, min(cores(), MAX_VALUES // values))  # together they take no more than one image may
        self._session = open_session(ort, model.data, self._path, device)
        self.z_dim, self.size, self._dtype, more = _check_signature(self._session, self._path)
        self.has_psi = "psi" in more
        self.is_uint8 = self._dtype == np.uint8
        self._shape = (self.size, self.size, 3) if self.is_uint8 else (3, self.size, self.size)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.classes = read_classes(self.metadata, path) if "label" in more else ()
        self.provider: str = self._session.get_providers()[0]
        self.device = "cuda" if self.provider == CUDA else "cpu"
        for key, value in (("z_dim", self.z_dim), ("size", self.size)):
            if self.metadata.get(key, str(value)) != str(value):
                raise UserError(
                    f"{path}: its metadata says {key} {self.metadata[key][:20]}, its graph {value}; export it again"
                )

    def __call__(
        self,
        z: np.ndarray,
        psi: float | np.ndarray = 1.0,
        move: float | np.ndarray = 0.0,
        label: int | np.ndarray = 0,
    ) -> np.ndarray:
        """Images uint8 ``[n, size, size, 3]`` of ``z`` float32 ``[n, z_dim]``.

        Args:
            psi: truncation, one for all or ``[n]``.
            move: added to z after it was scaled, ``[z_dim]``.
            label: of the class, an index into ``classes``, one for all or int64 ``[n]``; 0 if there are no classes.
        """
        if self.is_uint8:
            return self.output(z, psi, move, label)
        return self._fill(np.empty((len(z), self.size, self.size, 3), np.uint8), z, psi, move, label, to_uint8)

    def output(
        self,
        z: np.ndarray,
        psi: float | np.ndarray = 1.0,
        move: float | np.ndarray = 0.0,
        label: int | np.ndarray = 0,
    ) -> np.ndarray:
        """The output of the graph: float32 ``[n, 3, size, size]``, nominally in [-1, 1], or if the graph itself rounds,
        uint8 ``[n, size, size, 3]``."""
        return self._fill(np.empty((len(z), *self._shape), self._dtype), z, psi, move, label, lambda output: output)

    def _fill(
        self,
        out: np.ndarray,
        z: np.ndarray,
        psi: float | np.ndarray,
        move: float | np.ndarray,
        label: int | np.ndarray,
        convert: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Write ``convert(output)`` of all latents to ``out``, batch by batch, and return it."""
        assert z.dtype == np.float32, z.dtype
        assert z.ndim == 2, z.shape
        assert z.shape[1] == self.z_dim, z.shape
        batch = BATCH[self.provider]
        psis = np.broadcast_to(np.float32(psi), len(z))
        labels = np.broadcast_to(np.asarray(label), len(z))
        assert np.issubdtype(labels.dtype, np.integer), labels.dtype
        # Operators differ in what they do with a label out of range.
        assert ((labels >= 0) & (labels < max(1, len(self.classes)))).all(), (label, len(self.classes))
        z = (z if self.has_psi else z * psis[:, None]) + np.float32(move)

        def fill(part: slice) -> None:
            own = z[part]
            feed: dict[str, np.ndarray] = {"z": np.zeros((batch, self.z_dim), np.float32)}
            feed["z"][: len(own)] = own
            if self.classes:
                feed["label"] = np.zeros(batch, np.int64)
                feed["label"][: len(own)] = labels[part]
            if self.has_psi:
                feed["psi"] = np.array(psis[part.start])
            out[part] = convert(self._run(feed)[: len(own)])

        # The graph takes one psi per call.
        changes = (np.flatnonzero(np.diff(psis)) + 1).tolist() if self.has_psi else []
        parts = [
            slice(i, min(i + batch, stop))
            for start, stop in itertools.pairwise([0, *changes, len(z)])
            for i in range(start, stop, batch)
        ]
        threads = min(self._at_once, len(parts)) if self.provider == CPU else 1
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, parts))
        else:
            list(map(fill, parts))
        return out

    def _run(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        z = feed["z"]
        try:
            (images,) = self._session.run(["image"], feed)
        except onnxruntime_errors() as error:
            raise UserError(f"{self._path}: onnxruntime failed while generating: {brief(error)}") from error
        if images.shape != (len(z), *self._shape):
            raise UserError(f"{self._path}: gave {list(images.shape)} for {len(z)} latents; export it again")
        if not self.is_uint8 and not np.isfinite(images).all():
            raise UserError(f"{self._path}: gave values that are not finite; its weights are unusable")
        return images


def open_outline(ort: Any, outline: bytes, path: Path) -> Any:
    """An InferenceSession for reading shapes: without optimizations, which would compute constants."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _open(ort, outline, path, options)


def open_session(ort: Any, data: bytes, path: Path, device: str) -> Any:
    """An InferenceSession of the model ``data`` on ``device``; ``path`` is for messages.

    onnxruntime falls back to the CPU without an error, so the session's provider is checked.
    """
    if device != "cpu":
        problem = why_no_cuda(ort)
        is_offered = problem is None
        if is_offered:
            try:
                session = _session(ort, data, ort.SessionOptions(), [(CUDA, _CUDA_OPTIONS), CPU])
                if session.get_providers()[0] == CUDA:
                    return session
                problem = f"its CUDA or cuDNN libraries did not load: {INSTALL_CUDA}"
            except onnxruntime_errors() as error:
                problem = f"it failed: {brief(error)}"
        if device == "cuda":
            raise UserError(f"device cuda: {problem}; or choose the device cpu")
        if is_offered:
            say(f"warning: using the CPU although there is an NVIDIA GPU: onnxruntime offers CUDA, but {problem}")
    return _open(ort, data, path, ort.SessionOptions())


def _open(ort: Any, data: bytes, path: Path, options: Any) -> Any:
    """An InferenceSession on the CPU."""
    try:
        return _session(ort, data, options, [CPU])
    except onnxruntime_errors() as error:
        raise UserError(f"{path}: {why_not_loaded(ort, error)}") from error


def _session(ort: Any, data: bytes, options: Any, providers: list[Any]) -> Any:
    options.intra_op_num_threads = 1  # see BATCH
    # Without enable_fallback=0, onnxruntime replaces a provider that raises, and prints that to stdout.
    return ort.InferenceSession(data, options, providers=providers, enable_fallback=0)


def _check_signature(session: Any, path: Path) -> tuple[int, int, type[np.generic], tuple[str, ...]]:
    """(z_dim, size, type of the images, names of the further inputs) of a graph with the input ``z``, maybe a ``label``
    for each image after it, then maybe a scalar ``psi``, one output ``image`` and any batch size.

    Raises ``UserError`` for any other graph.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    given, made = [[(t.name, t.type, *t.shape) for t in tensors] for tensors in (inputs, outputs)]
    match [given[:1], made]:
        case [[("z", "tensor(float)", batch, int(z_dim))], [("image", "tensor(float)", _, 3, int(height), int(width))]]:
            dtype: type[np.generic] = np.float32
        case [[("z", "tensor(float)", batch, int(z_dim))], [("image", "tensor(uint8)", _, int(height), int(width), 3)]]:
            dtype = np.uint8
        case _:
            raise _not_a_generator(path, inputs, outputs)
    match given[1:]:
        case [] | [("psi", "tensor(float)")]:
            is_known = True
        case [("label", "tensor(int64)", labels)] | [("label", "tensor(int64)", labels), ("psi", "tensor(float)")]:
            is_known = not isinstance(labels, int)
        case _:
            is_known = False
    if not is_known or isinstance(batch, int) or height != width:
        raise _not_a_generator(path, inputs, outputs)
    return z_dim, height, dtype, tuple(name for name, *_ in given[1:])


def _not_a_generator(path: Path, inputs: Any, outputs: Any) -> UserError:
    return UserError(
        f"{path}: not a generator: {_describe(inputs)} -> {_describe(outputs)}, but needed is z float [batch, z_dim], "
        "then maybe label int64 [batch], then maybe psi float [], -> image float [batch, 3, size, size] or uint8 "
        "[batch, size, size, 3] with any batch; make it with catexport"
    )


def _describe(tensors: Any) -> str:
    shown = [
        f"{t.name} {t.type.removeprefix('tensor(').removesuffix(')')} "
        f"[{', '.join('?' if d is None else str(d) for d in t.shape)}]"
        for t in tensors
    ]
    return ", ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")
