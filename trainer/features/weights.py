"""Where the weights of the judging networks come from, and loading them without trusting them."""

from __future__ import annotations

import hashlib
import os
import pickle
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from tqdm import tqdm

from catgan.command import UserError, say
from catgan.files import atomic_path

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""pytorch-fid's InceptionV3, the weights behind the name FID (torch-fidelity's file is the same)."""

_ENVIRONMENT = "CATGAN_INCEPTION_WEIGHTS"
_OFFLINE = "CATGAN_OFFLINE"
_TIMEOUT = 5.0  # seconds without an answer; a cluster without internet must not wait for longer

# What torch.load raises on files that are no weights; it has no common error class.
_NOT_WEIGHTS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Unavailable(Exception):
    """The Inception weights cannot be had here; the message is the reason."""


def find_inception(weights: str | Path | None = None) -> Path:
    """The file with InceptionV3's weights: ``weights``, CATGAN_INCEPTION_WEIGHTS, torch hub's cache or a download.

    Raises:
        UserError: a file is named but not there.
        Unavailable: none is named, none is cached, and CATGAN_OFFLINE is set or the download does not work.
    """
    if named := weights or os.environ.get(_ENVIRONMENT):
        path = Path(named).expanduser()
        if not path.is_file():
            origin = "" if weights else f" (named by {_ENVIRONMENT})"
            raise UserError(
                f"no weights file at {path}{origin}: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
            )
        return path
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rpartition("/")[2])
    if not path.is_file():
        if os.environ.get(_OFFLINE, "0") not in ("", "0"):
            raise Unavailable(f"not in {path.parent}, and {_OFFLINE} is set")
        _download(FID_WEIGHTS_URL, path)
    return path


def _download(url: str, path: Path) -> None:
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            total = int(response.headers.get("Content-Length", 0)) or None
            with (
                atomic_path(path) as temporary,
                temporary.open("wb") as file,
                tqdm(total=total, desc="Inception weights", unit="B", unit_scale=True, leave=False) as bar,
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                if digest.hexdigest() != INCEPTION_SHA256:
                    raise Unavailable(f"download from {urlsplit(url).hostname} arrived damaged")
    except (OSError, HTTPException) as error:
        raise Unavailable(f"download from {urlsplit(url).hostname} failed: {getattr(error, 'reason', error)}") from None
    say(f"downloaded {url} to {path}")


def sha256(path: Path) -> str:
    """The file's SHA-256 (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill ``network`` from the state dict at ``path``; only tensors are unpickled.

    Raises:
        UserError: the file is not a state dict of this network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_WEIGHTS:
        raise UserError(
            f"{path} is not a file of weights (a PyTorch state dict): give another, or fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than the weights of a network: give another file")
    try:
        result = network.load_state_dict(state, strict=False)
    except RuntimeError:
        raise UserError(
            f"{path} has weights of other shapes than {type(network).__name__}'s: give another file"
        ) from None
    # Batch norm counts batches in training only, and files written before PyTorch 0.4.1 lack the count.
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    if wrong := missing or result.unexpected_keys:
        problem = f"lacks {wrong[0]}" if missing else f"has the unknown {wrong[0]}"
        raise UserError(f"{path} holds the weights of another network than {type(network).__name__} ({problem})")
