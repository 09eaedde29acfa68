"""Why onnxruntime, CUDA or a model does not work on this machine, each reason in one line."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from typing import Any, NamedTuple

from catgan.command import UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

# The first onnxruntime release that reads an ONNX IR version or opset (found by trying the releases 1.19 to 1.31).
_FIRST_WITH_IR = {11: "1.23", 12: "1.24", 13: "1.24"}
_FIRST_WITH_OPSET = {22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.25"}


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``, with its own messages turned off. Raises ``UserError`` if it cannot be imported."""
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
    onnxruntime.set_default_logger_severity(4)  # its C++ messages would hide the one line for the user
    return onnxruntime


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own exceptions, which have no common base class, and two built-in ones."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception)]
    return (*own, RuntimeError, ValueError)


def brief(error: Exception) -> str:
    """onnxruntime's message without its error code, on one line of at most 200 characters."""
    text = " ".join(re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).split())
    return text if len(text) <= 200 else text[:197] + "..."


def why_not_loaded(ort: Any, error: Exception) -> str:
    """Why onnxruntime refused a model; for a model that is too new, which release reads it."""
    text = str(error)
    for what, pattern, first in (
        ("IR version", r"model IR version: (\d+), max supported IR version: (\d+)", _FIRST_WITH_IR),
        ("opset", r"Opset (\d+) is under development.* till opset (\d+)", _FIRST_WITH_OPSET),
    ):
        if found := re.search(pattern, text, re.DOTALL):
            needed, supported = map(int, found.groups())
            release = f">= {first[needed]}" if needed in first else "to its newest release"
            return (
                f"needs ONNX {what} {needed}, onnxruntime {ort.__version__} supports up to {supported}: "
                f"upgrade onnxruntime {release}"
            )
    return f"onnxruntime {ort.__version__} cannot load it: {brief(error)}"


def why_no_cuda(ort: Any) -> str | None:
    """What CUDA lacks before a session is worth trying, or None. Loads CUDA's libraries in the latter case.

    onnxruntime-gpu lists CUDA as available on machines without a GPU too, hence the question to the driver.
    """
    if CUDA not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} has no CUDA: pip uninstall onnxruntime, "
            "then pip install 'catgan[infer-gpu]'"
        )
    driver = cuda_driver()
    if driver is None or driver.gpus == 0:
        return "no NVIDIA GPU (or no driver for it) on this machine"
    load_cuda_libraries(ort)
    return None


def load_cuda_libraries(ort: Any) -> None:
    """Load the libraries of the nvidia-* wheels, which onnxruntime finds only if they are loaded already."""
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


class CudaDriver(NamedTuple):
    """``error`` of cuInit (0: none), the newest CUDA ``version`` that the driver supports, such as "13.0", and the
    number of ``gpus`` that this process may use."""

    error: int
    version: str
    gpus: int


def cuda_driver() -> CudaDriver | None:
    """The CUDA driver, which respects CUDA_VISIBLE_DEVICES, containers and WSL2; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, gpus = ctypes.c_int(0), ctypes.c_int(0)
    if error := driver.cuInit(0):
        return CudaDriver(error, "", 0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(gpus))
    return CudaDriver(0, f"{version.value // 1000}.{version.value % 1000 // 10}", gpus.value)
