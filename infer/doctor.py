"""``catinfer doctor``: which devices work here, what is wrong with CUDA, and how to repair it."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from catgan.command import UserError, say
from catgan.machine import cores
from infer.diagnosis import (
    CUDA,
    INSTALL_CUDA,
    brief,
    cuda_driver,
    import_onnxruntime,
    load_cuda_libraries,
    onnxruntime_errors,
    why_no_cuda,
)
from infer.session import open_session

# The model z -> Identity -> image, float [1], IR version 8, opset 17: the smallest one that shows onnxruntime working.
TINY = bytes.fromhex(
    "08083a3f0a140a017a1205696d61676522084964656e746974791201745a0f0a017a120a0a08080112040a020801"
    "62130a05696d616765120a0a08080112040a02080142040a001011"
)


def doctor(device: str) -> dict[str, Any]:
    """Report on stderr and in the result what works: ``cpu`` and ``cuda`` tell whether onnxruntime computed there.

    Raises:
        UserError: the CPU does not work, or with ``device`` "cuda", CUDA does not.
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
    ort = import_onnxruntime()
    say(f"onnxruntime {ort.__version__} offers {', '.join(ort.get_available_providers())}")
    _compute(ort, "cpu")
    say(f"CPU: works, {cores()} threads")
    driver = _describe_driver()
    say(f"CUDA driver: {driver or 'none'}")
    why = why_no_cuda(ort)
    missing = _missing_libraries(ort) if CUDA in ort.get_available_providers() else []
    if missing:
        problems.append(
            f"libraries that do not load: {', '.join(missing)}: {INSTALL_CUDA}, or add their folder to LD_LIBRARY_PATH"
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
    """Run the tiny model on ``device``. Raises ``UserError`` if that does not work."""
    session = open_session(ort, TINY, Path("a tiny model"), device)
    value = np.ones(1, np.float32)
    try:
        (same,) = session.run(["image"], {"z": value})
    except onnxruntime_errors() as error:
        raise UserError(f"onnxruntime does not compute: {brief(error)}; reinstall it") from error
    assert same == value, same


def _describe_driver() -> str | None:
    driver = cuda_driver()
    if driver is None:
        return None
    if driver.error:
        return f"does not start (error {driver.error} of cuInit)"
    return f"up to CUDA {driver.version}, {driver.gpus} GPUs"


def _missing_libraries(ort: Any) -> list[str]:
    """The CUDA and cuDNN libraries that onnxruntime's CUDA provider names and that do not load (Linux only)."""
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        return []
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.findall(rb"\0(lib(?:cudart|cublas|cublasLt|curand|cufft|cudnn)\.so)\.(\d+)(?=\0)", content)
    # If a library is named in two versions, onnxruntime was built with the newer one.
    # cuDNN 9 is not linked but opened by name at first use.
    newest = {"libcudnn.so": 9} | {
        name: version for version, name in sorted((int(version), name.decode()) for name, version in found)
    }
    load_cuda_libraries(ort)
    return [f"{name}.{version}" for name, version in newest.items() if not _loads(f"{name}.{version}")]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
