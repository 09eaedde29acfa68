"""Directions in the latent space, which an exported generator carries in its metadata (see export/directions.py).

The entry ``directions`` is ``1 `` (the version of the format), then base64 of float16, little-endian, ``[k, z_dim]``:
``k`` unit vectors. Along a unit vector latents of N(0, I) have a standard deviation of 1, so a multiple of it is a
number of standard deviations.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from os import PathLike

import numpy as np

from catgan.command import UserError

ENTRY = "directions"
MAX_COUNT = 64
_PREFIX = "1 "
_TOLERANCE = 0.01  # of the vectors' norm; float16 rounds it by less than 0.001


def encode(vectors: np.ndarray) -> str:
    """The metadata entry of unit vectors ``[k, z_dim]``."""
    return _PREFIX + base64.b64encode(vectors.astype("<f2").tobytes()).decode()


def read_directions(metadata: Mapping[str, str], z_dim: int, path: str | PathLike[str]) -> np.ndarray:
    """The directions of the generator at ``path``, float32 ``[k, z_dim]``; ``k`` is 0 for a file without any.

    Raises:
        UserError: the entry is not as described above, or has more than ``MAX_COUNT`` directions.
    """
    text = metadata.get(ENTRY)
    if text is None:
        return np.empty((0, z_dim), np.float32)
    problem = f"{path}: its metadata has an entry {ENTRY!r} that cannot be used"
    if not text.startswith(_PREFIX):
        raise UserError(f"{problem}: {text[:10]!r} does not begin with the known version, 1; export it again")
    if len(text) > len(_PREFIX) + 4 * -(-2 * MAX_COUNT * z_dim // 3):
        raise UserError(f"{problem}: more than {MAX_COUNT} directions; export it again")
    try:
        data = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{problem}: not base64; export it again") from error
    if len(data) % (2 * z_dim):
        raise UserError(f"{problem}: {len(data)} bytes are not float16 vectors of {z_dim}; export it again")
    vectors = np.frombuffer(data, "<f2").astype(np.float32).reshape(-1, z_dim)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
    if not (np.abs(norms - 1) <= _TOLERANCE).all():  # false for NaN
        raise UserError(f"{problem}: not unit vectors; export it again")
    return vectors


def shift(directions: np.ndarray, amounts: Mapping[int, float], path: str | PathLike[str]) -> np.ndarray:
    """What ``amounts``, {number of a direction from 1 on: multiple}, add to a latent: float32 ``[z_dim]``.

    Raises:
        UserError: there is no direction of that number.
    """
    count, z_dim = directions.shape
    total = np.zeros(z_dim, np.float32)
    for number, amount in sorted(amounts.items()):
        if number > count:
            have = f"1 to {count}" if count else "none; catexport writes them into a new file"
            raise UserError(f"--direction {number}={amount:g}: {path} has the directions {have}")
        total += np.float32(amount) * directions[number - 1]
    return total
