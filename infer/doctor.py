"""``catinfer doctor``: what computes here, what is wrong with CUDA, and how to mend it."""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import platform
import re
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from catgan.command import UserError, say
from infer import session

# The model z -> Identity -> image, float [1], IR version 8, opset 17: the smallest that proves that onnxruntime works.
TINY = bytes.fromhex(
    "08083a3f0a140a017a1205696d61676522084964656e746974791201745a0f0a017a120a0a08080112040a020801"
    "62130a05696d616765120a0a08080112040a02080142040a001011"
)


def doctor(device: str) -> dict[str, Any]:
    """Say what is found, and return it: ``cpu`` and ``cuda`` tell whether onnxruntime really computed there.

    Raises ``UserError`` where the CPU does not work, and with ``device`` "cuda" where CUDA does not.
    """
    found = _runtimes()
    say(f"{platform.platform()}, Python {platform.python_version()}, NumPy {np.__version__}, Pillow {PIL.__version__}")
    say("installed: " + (", ".join(f"{name} {version}" for name, version in found.items()) or "no onnxruntime"))
    problems = []
    if len(found) > 1:
        problems.append(
            f"{' and '.join(found)} overwrite each other's files: pip uninstall -y {' '.join(found)}, then install "
            "one, 'catgan[infer]' or for an NVIDIA GPU 'catgan[infer-gpu]'"
        )
    ort = session._import_onnxruntime()
    say(f"onnxruntime {ort.__version__} offers {', '.join(ort.get_available_providers())}")
    _compute(ort, "cpu")
    say(f"CPU: works, {session.cores()} threads")
    driver = _driver()
    say(f"CUDA driver: {driver or 'none'}")
    why = session._why_no_cuda(ort)
    missing = _missing_libraries(ort) if session.CUDA in ort.get_available_providers() else []
    if missing:
        problems.append(
            f"libraries that do not load: {', '.join(missing)}: pip install 'onnxruntime-gpu[cuda,cudnn]', or put "
            "their folder into LD_LIBRARY_PATH"
        )
    if why is None:
        try:
            _compute(ort, "cuda")
        except UserError as error:
            why = str(error)
    say(f"CUDA: {why or 'works'}")
    for problem in problems:
        say(f"problem: {problem}")
    if device == "cuda" and why is not None:
        raise UserError(f"CUDA does not work: {'; '.join([why, *problems])}")
    return {
        "cpu": True,
        "cuda": why is None,
        "why_no_cuda": why,
        "onnxruntime": ort.__version__,
        "installed": found,
        "providers": ort.get_available_providers(),
        "cuda_driver": driver,
        "problems": problems,
    }


def _runtimes() -> dict[str, str]:
    """Names and versions of the installed distributions that contain the module ``onnxruntime``."""
    names = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions() if d.metadata["Name"]}
    return {name: names[name] for name in sorted(names) if re.fullmatch(r"onnxruntime(-(?!extensions|genai).*)?", name)}


def _compute(ort: Any, device: str) -> None:
    """Run the tiny model; ``UserError`` where that does not work."""
    opened = session._open(ort, TINY, Path("a tiny model"), device)
    value = np.ones(1, np.float32)
    try:
        (same,) = opened.run(["image"], {"z": value})
    except session._onnxruntime_errors() as error:
        raise UserError(f"onnxruntime does not compute: {session._brief(error)}; reinstall it") from error
    assert same == value, same


def _driver() -> str | None:
    """The newest CUDA version that the driver knows and its number of GPUs, in words; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if status := driver.cuInit(0):
        return f"does not start (error {status} of cuInit)"
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    return f"up to CUDA {version.value // 1000}.{version.value % 1000 // 10}, {count.value} GPUs"


def _missing_libraries(ort: Any) -> list[str]:
    """The CUDA and cuDNN libraries that onnxruntime's CUDA provider names and that do not load (Linux only)."""
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        return []
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.findall(rb"\0(lib(?:cudart|cublas|cublasLt|curand|cufft|cudnn)\.so)\.(\d+)(?=\0)", content)
    # Of a library that it can take in two versions, the newer is that of its own build.
    # cuDNN 9 is not linked but opened by name when it is wanted.
    newest = {"libcudnn.so": 9} | {
        name: version for version, name in sorted((int(version), name.decode()) for name, version in found)
    }
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    return [f"{name}.{version}" for name, version in newest.items() if not _loads(f"{name}.{version}")]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
