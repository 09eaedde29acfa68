"""Checkpoint files, and released generator weights.

A checkpoint is a folder ``checkpoint_<nimg>``. Its ``state.pt`` holds the state of ``checkpoints.state``: tensors and
plain values only, read with ``weights_only=True``. ``checkpoint.json`` has the length and SHA-256 of ``state.pt`` and
is written last, so that incomplete and damaged checkpoints are detected. Released weights are safetensors whose header
carries the configuration and the origin.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from catgan.command import UserError
from trainer.config import Config
from trainer.models import AtLevel, Generator, build_generator

FORMAT_VERSION = 3
NUM_TO_KEEP = 2
PREFIX = "checkpoint_"
_STATE, _LAST = "state.pt", "checkpoint.json"
FILES = (_STATE, _LAST)
"""The files of a checkpoint, in the order in which they are written."""

_FOLDER = re.compile(PREFIX + r"\d{9,}")


class Damaged(UserError):
    """A checkpoint whose files are incomplete or corrupted."""


def folder_name(nimg: int) -> str:
    """Names sort by position."""
    return f"{PREFIX}{nimg:012d}"


def position(name: str) -> int:
    """Images seen, from a checkpoint folder's name."""
    return int(name.removeprefix(PREFIX))


def find_all(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    if not run_dir.is_dir():
        return []
    return sorted(p for p in run_dir.iterdir() if _FOLDER.fullmatch(p.name) and is_checkpoint(p))


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` holds a completely written checkpoint."""
    return (folder / _LAST).is_file()


def is_last_file(name: str) -> bool:
    """Whether ``name``, relative to the run's folder, is the last file of a checkpoint."""
    folder, _, file = name.partition("/")
    return file == _LAST and _FOLDER.fullmatch(folder) is not None


def encode(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint with this state, in the order to write them."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    data = buffer.getvalue()
    end = {"format_version": FORMAT_VERSION, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {_STATE: data, _LAST: json.dumps(end).encode()}


def decode(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The state in the files of the checkpoint at ``where``, on the CPU.

    Raises:
        Damaged: it is broken.
        UserError: it has another format version, or a newer version of this program wrote its configuration.
    """
    data = files[_STATE]
    try:
        end = json.loads(files[_LAST])
        version, expected = end["format_version"], (end["bytes"], end["sha256"])
    except (ValueError, TypeError, LookupError):
        raise Damaged(f"{where} cannot be read: its {_LAST} is damaged") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}; this program reads version {FORMAT_VERSION}")
    if (len(data), hashlib.sha256(data).hexdigest()) != expected:
        raise Damaged(f"{where} cannot be read: its {_STATE} is damaged ({len(data)} bytes)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise Damaged(f"{where} cannot be read: {next(iter(str(error).splitlines()), 'it is empty')}") from error
    try:
        Config.from_dict(state["config"])
    except ValueError as error:
        raise UserError(f"{where} has a configuration of another version: {error}") from None
    return state


def load(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU.

    Raises:
        Damaged: it is broken.
        UserError: no checkpoint there, another format version, or the disk does not answer.
    """
    if not is_checkpoint(folder):
        raise UserError(f"{folder} is not a checkpoint (no {_LAST} in it)")
    try:
        files = {file: (folder / file).read_bytes() for file in FILES}
    except FileNotFoundError as error:
        raise Damaged(f"{folder} cannot be read: {error.strerror}: {_STATE}") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    return decode(files, str(folder))


def encode_generator(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> bytes:
    """The weights of a network as a safetensors file; ``info`` (JSON) goes into its header.

    Args:
        info: recipe, kimg, metric, run_id, dataset_digest, config.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return to_safetensors(own, metadata={"catgan": json.dumps({"format_version": FORMAT_VERSION, **info})})


def load_generator(path: Path) -> tuple[Generator, dict[str, Any]]:
    """The generator of a run, of its ``best`` folder, of a ``.safetensors`` file or of a checkpoint (its EMA).

    Returns:
        The module in evaluation mode on the CPU, and recipe, kimg, metric, run_id, dataset_digest, config.

    Raises:
        UserError: nothing of the kind at ``path``.
    """
    for candidate in _released(path):
        return _from_safetensors(candidate)
    if is_checkpoint(path):
        return _from_checkpoint(path)
    if found := find_all(path):
        return _from_checkpoint(found[-1])
    raise UserError(
        f"{path} holds no generator; give a run's folder, its best/ folder, a gen.safetensors or a checkpoint folder"
    )


def holds_weights(path: Path) -> bool:
    """Whether ``path`` is a run, a checkpoint or released weights."""
    return bool(_released(path)) or is_checkpoint(path) or bool(find_all(path))


def _released(path: Path) -> list[Path]:
    """Released weights at ``path``: the file itself, or those of a run or its ``best`` folder."""
    if path.suffix == ".safetensors":
        return [path] if path.is_file() else []
    return [p for p in (path / "gen.safetensors", path / "best" / "gen.safetensors") if p.is_file()]


def _from_safetensors(path: Path) -> tuple[Generator, dict[str, Any]]:
    tensors, info = load_weights(path)
    try:
        return _generator(info, tensors), info
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        # Anybody can write such a file: PyTorch reports shapes that do not match as a RuntimeError.
        raise UserError(f"the configuration in {path} does not fit its weights ({repr(error)[:200]})") from None


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a ``.safetensors`` file of this program and the ``info`` of ``encode_generator``.

    Raises:
        UserError: it is not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("catgan")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    if header is None:
        raise UserError(f"{path} was not written by this program: its header lacks the configuration")
    try:
        info = json.loads(header)
        version = info["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the header of {path} is damaged ({error!r})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}")
    return tensors, info


def _from_checkpoint(folder: Path) -> tuple[Generator, dict[str, Any]]:
    state = load(folder)
    info = origin(state)
    return _generator(info, state["ema"]), info


def origin(state: Mapping[str, Any]) -> dict[str, Any]:
    """recipe, kimg, metric, run_id, dataset_digest and config of a checkpoint's state."""
    kimg, metric = state["nimg"] / 1000, state.get("last_metric")
    return {
        "recipe": state["config"]["recipe"],
        "kimg": kimg,
        "metric": metric if metric and metric["kimg"] == kimg else None,  # an older one is of another generator
        "run_id": state.get("run_id"),
        "dataset_digest": state.get("dataset_digest"),
        "config": state["config"],
    }


def _generator(info: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Generator:
    """The generator with its weights; a progressive one at the resolution it had reached."""
    config = Config.from_dict(info["config"])
    generator = build_generator(config.model)
    generator.load_state_dict(tensors)
    generator.eval().requires_grad_(False)
    level = config.grow.level(round(info["kimg"] * 1000), config.model.size)
    return AtLevel(generator, level) if generator.grows and level < generator.size.bit_length() - 1 else generator
