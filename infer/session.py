"""The checked ONNX file as a function from latents to pictures. onnxruntime is imported when one is opened."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from catgan.command import UserError, say
from catgan.machine import cores
from infer.grid import to_uint8
from infer.limits import MAX_VALUES, check_operators, check_work
from infer.onnxfile import read_model

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda")

# Pictures per call of onnxruntime. It is fixed, with the last batch filled up, so that a picture does not depend on
# how many others are asked for: kernels are chosen by batch size, and dynamic quantisation even scales by the batch.
# On CPUs each call computes one picture on one thread, and as many calls run at once as there are cores: nothing is
# left that could depend on either number, and no thread waits for another within a picture. Measured faster than one
# call with all threads and all pictures (benchmarks/inference.py).
BATCH = {CPU: 1, CUDA: 32}

# TF32 would show as other pixel values than the CPU's; the default cuDNN search times the algorithms, so the choice
# and with it the last bits would differ from run to run.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}

# First onnxruntime release that reads an ONNX IR version or opset (found by trying the releases 1.19 to 1.31).
_FIRST_WITH_IR = {11: "1.23", 12: "1.24", 13: "1.24"}
_FIRST_WITH_OPSET = {22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.25"}


class Generator:
    """A generator in an ONNX file: latents ``z`` float32 ``[n, z_dim]`` -> pictures uint8 ``[n, size, size, 3]``.

    ``device`` is "cpu", "cuda" (an error where CUDA does not work) or "auto" (CUDA where it works, else the CPU).
    Picture ``i`` depends on ``z[i]`` alone, not on ``n``. Raises ``UserError`` for a file that is not one
    self-contained generator with input ``z`` and output ``image``, and for a missing or unfit onnxruntime.

    Attributes: ``z_dim``, ``size`` (pixels), ``is_uint8`` (whether the graph itself rounds), ``metadata`` (the file's
    text entries), ``provider`` (onnxruntime's name of what computes, such as "CPUExecutionProvider").
    """

    def __init__(self, path: str | PathLike[str], device: str = "auto") -> None:
        assert device in DEVICES, device
        self._path = Path(path)
        model = read_model(self._path)
        check_operators(model, self._path)
        ort = _import_onnxruntime()
        values = check_work(model, _open_outline(ort, model.outline, self._path), self._path)
        self._at_once = max(1, min(cores(), MAX_VALUES // values))  # together they take no more than one may
        self._session = _open(ort, model.data, self._path, device)
        self.z_dim, self.size, self._dtype = _check_signature(self._session, self._path)
        self.is_uint8 = self._dtype == np.uint8
        self._shape = (self.size, self.size, 3) if self.is_uint8 else (3, self.size, self.size)
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.provider: str = self._session.get_providers()[0]
        for key, value in (("z_dim", self.z_dim), ("size", self.size)):
            if self.metadata.get(key, str(value)) != str(value):
                raise UserError(
                    f"{path}: its metadata says {key} {self.metadata[key][:20]}, its graph {value}; export it again"
                )

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Pictures uint8 ``[n, size, size, 3]`` of ``z`` float32 ``[n, z_dim]``."""
        if self.is_uint8:
            return self.images(z)
        return self._fill(np.empty((len(z), self.size, self.size, 3), np.uint8), z, to_uint8)

    def images(self, z: np.ndarray) -> np.ndarray:
        """The network's own output: float32 ``[n, 3, size, size]``, nominally in [-1, 1], or if the graph rounds
        itself, uint8 ``[n, size, size, 3]``."""
        return self._fill(np.empty((len(z), *self._shape), self._dtype), z, lambda images: images)

    def _fill(self, out: np.ndarray, z: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """``out`` with ``convert(images)`` of all latents in it, batch by batch."""
        assert z.dtype == np.float32, z.dtype
        assert z.ndim == 2, z.shape
        assert z.shape[1] == self.z_dim, z.shape
        batch = BATCH[self.provider]

        def fill(start: int) -> None:
            part = z[start : start + batch]
            filled = np.zeros((batch, self.z_dim), np.float32)
            filled[: len(part)] = part
            out[start : start + batch] = convert(self._run(filled)[: len(part)])

        starts = range(0, len(z), batch)
        threads = min(self._at_once, len(starts)) if self.provider == CPU else 1
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, starts))
        else:
            list(map(fill, starts))
        return out

    def _run(self, z: np.ndarray) -> np.ndarray:
        try:
            (images,) = self._session.run(["image"], {"z": z})
        except _onnxruntime_errors() as error:
            raise UserError(f"{self._path}: onnxruntime failed while generating: {_brief(error)}") from error
        if images.shape != (len(z), *self._shape):
            raise UserError(f"{self._path}: gave {list(images.shape)} for {len(z)} latents; export it again")
        if not self.is_uint8 and not np.isfinite(images).all():
            raise UserError(f"{self._path}: gave values that are not finite; its weights are unusable")
        return images


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise UserError(
            "onnxruntime is not installed: pip install 'catgan[infer]' (or 'catgan[infer-gpu]' for an NVIDIA GPU)"
        ) from error
    except ImportError as error:
        raise UserError(f"onnxruntime is installed but does not load ({error}); reinstall it") from error
    onnxruntime.set_default_logger_severity(4)  # its C++ messages would drown the one line that a user should read
    return onnxruntime


def _open_outline(ort: Any, outline: bytes, path: Path) -> Any:
    """An InferenceSession for reading shapes from: nothing is optimised, so that nothing is computed."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(outline, options, providers=[CPU], enable_fallback=0)
    except _onnxruntime_errors() as error:
        raise UserError(f"{path}: {_load_problem(ort, error)}") from error


def _open(ort: Any, data: bytes, path: Path, device: str) -> Any:
    """An InferenceSession on ``device``. onnxruntime falls back to the CPU without a word, so look at what it did."""
    if device != "cpu":
        problem = _why_no_cuda(ort)
        offered = problem is None
        if offered:
            try:
                session = _session(ort, data, [(CUDA, _CUDA_OPTIONS), CPU])
                if session.get_providers()[0] == CUDA:
                    return session
                problem = "its CUDA or cuDNN libraries did not load: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            except _onnxruntime_errors() as error:
                problem = f"it failed: {_brief(error)}"
        if device == "cuda":
            raise UserError(f"device cuda: {problem}; or choose the device cpu")
        if offered:
            say(f"warning: using the CPU although there is an NVIDIA GPU: onnxruntime offers CUDA, but {problem}")
    try:
        return _session(ort, data, [CPU])
    except _onnxruntime_errors() as error:
        raise UserError(f"{path}: {_load_problem(ort, error)}") from error


def _session(ort: Any, data: bytes, providers: list[Any]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # see BATCH
    # enable_fallback=0: else onnxruntime replaces a provider that raises, and prints that to stdout.
    return ort.InferenceSession(data, options, providers=providers, enable_fallback=0)


def _why_no_cuda(ort: Any) -> str | None:
    """What CUDA lacks before it is worth trying, or None.

    onnxruntime-gpu lists CUDA on machines without a GPU too (so look for the driver and a device first), and finds
    the libraries of the nvidia-* wheels only when they are loaded beforehand (``preload_dlls``, since 1.21).
    """
    if CUDA not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} has no CUDA: pip uninstall onnxruntime, "
            "then pip install 'catgan[infer-gpu]'"
        )
    if not _has_nvidia_gpu():
        return "no NVIDIA GPU (or no driver for it) on this machine"
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return None


def _has_nvidia_gpu() -> bool:
    """Ask the CUDA driver, which also knows CUDA_VISIBLE_DEVICES, containers and WSL2; instant where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _check_signature(session: Any, path: Path) -> tuple[int, int, type[np.generic]]:
    """(z_dim, size, type of the pictures) of a graph that keeps the contract: one ``z`` in, one ``image`` out, any
    batch."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    match [[(t.name, t.type, *t.shape) for t in tensors] for tensors in (inputs, outputs)]:
        case [[("z", "tensor(float)", batch, int(z_dim))], [("image", "tensor(float)", _, 3, int(height), int(width))]]:
            if not isinstance(batch, int) and height == width:
                return z_dim, height, np.float32
        case [[("z", "tensor(float)", batch, int(z_dim))], [("image", "tensor(uint8)", _, int(height), int(width), 3)]]:
            if not isinstance(batch, int) and height == width:
                return z_dim, height, np.uint8
    raise UserError(
        f"{path}: not a generator: {_describe(inputs)} -> {_describe(outputs)}, but needed is z float [batch, z_dim] "
        "-> image float [batch, 3, size, size] or uint8 [batch, size, size, 3] with any batch; make it with catexport"
    )


def _describe(tensors: Any) -> str:
    shown = [
        f"{t.name} {t.type.removeprefix('tensor(').removesuffix(')')} "
        f"[{', '.join('?' if d is None else str(d) for d in t.shape)}]"
        for t in tensors
    ]
    return ", ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions have no common base but Exception; those of its Python layer are built-in ones."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception)]
    return (*own, RuntimeError, ValueError)


def _load_problem(ort: Any, error: Exception) -> str:
    """Why onnxruntime refused the model, in one line; for a model from the future, which release reads it."""
    text = str(error)
    for what, pattern, first in (
        ("IR version", r"model IR version: (\d+), max supported IR version: (\d+)", _FIRST_WITH_IR),
        ("opset", r"Opset (\d+) is under development.* till opset (\d+)", _FIRST_WITH_OPSET),
    ):
        if found := re.search(pattern, text, re.DOTALL):
            needed, known = map(int, found.groups())
            release = f">= {first[needed]}" if needed in first else "to its newest release"
            return (
                f"needs ONNX {what} {needed}, onnxruntime {ort.__version__} knows up to {known}: "
                f"upgrade onnxruntime {release}"
            )
    return f"onnxruntime {ort.__version__} cannot load it: {_brief(error)}"


def _brief(error: Exception) -> str:
    """onnxruntime's message without its code prefix, on one line of at most 200 characters."""
    text = " ".join(re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).split())
    return text if len(text) <= 200 else text[:197] + "..."
