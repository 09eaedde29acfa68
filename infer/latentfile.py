"""Files with one latent, ``NAME.npz``: what `cattrain project` writes and `catinfer --latent` reads.

NumPy's npz format (a ZIP of .npy files) with

- ``z``: float32 ``[1, z_dim]``, the latent;
- ``weights_sha256``: text, the generator's digest as in an ONNX file's metadata (optional when read);
- ``loss``: float64, the distance from the photo (not read).

The files are untrusted. ``numpy.load`` unpacks whatever size a file declares, and its parser of headers raises any of a
dozen errors, so members are read with a limit, and only the headers that NumPy writes for these types are accepted.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catgan.command import UserError
from catgan.files import atomic_open

MAX_BYTES = 2**20  # of the file, and of each array in it
_HEADER = re.compile(rb"\{'descr': '(<f4|<U64)', 'fortran_order': False, 'shape': \(([0-9, ]{0,40})\), \} *\n")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


@dataclass(frozen=True)
class Latent:
    """What a file holds: ``z`` float32 ``[1, z_dim]``, finite, and the digest of the generator's weights if known."""

    z: np.ndarray
    weights_sha256: str | None


def write_latent(path: Path, z: np.ndarray, weights_sha256: str, loss: float) -> None:
    """Write ``z`` float32 ``[1, z_dim]``. The same values give the same bytes. Raises ``UserError``."""
    assert z.dtype == np.float32, z.dtype
    assert z.ndim == 2, z.shape
    assert len(z) == 1, z.shape
    with atomic_open(path) as file:
        np.savez(file, allow_pickle=False, z=z, weights_sha256=np.array(weights_sha256, "<U64"), loss=np.float64(loss))


def read_latent(path: Path) -> Latent:
    """Read and check a file. Raises ``UserError`` if it is not as described above."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes; a latent has a few thousand")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            z = _array(archive, "z", "<f4")
            digest = _array(archive, "weights_sha256", "<U64")
        text = digest.item() if digest is not None and digest.ndim == 0 else ""
    except _BROKEN as error:
        raise UserError(
            f"{path}: not a latent ({error}); it needs an npz file with z, float32 [1, z_dim], such as `cattrain "
            "project` writes"
        ) from error
    if z is None or z.ndim != 2 or z.shape[0] != 1 or z.shape[1] == 0:
        shape = "no z" if z is None else f"z has the shape {list(z.shape)}"
        raise UserError(f"{path}: not a latent: {shape}, needed is z, float32 [1, z_dim]")
    if not np.isfinite(z).all():
        raise UserError(f"{path}: has values that are not finite; make it again with `cattrain project`")
    return Latent(z, text if _SHA256.fullmatch(text) else None)


def _array(archive: zipfile.ZipFile, name: str, dtype: str) -> np.ndarray | None:
    """The array ``name``; None if there is none. Raises one of ``_BROKEN``."""
    member = f"{name}.npy"
    if member not in archive.namelist():
        return None
    if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy does not use")
    with archive.open(member) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes")
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{name} is not an array in NumPy's format 1.0")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:start])
    if header is None or header[1].decode() != dtype:
        raise ValueError(f"{name} is not of type {dtype} in C order")
    shape = [int(size) for size in header[2].decode().replace(" ", "").split(",") if size]
    if len(data) - start != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{name} does not hold as many values as it declares")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
