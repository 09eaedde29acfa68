"""What is kept of a training: checkpoints to continue from, and the generator's weights to use.

A checkpoint is a folder ``checkpoint_<nimg>`` with one file, ``state.pt``: both networks, the average, both
optimisers, the position in images, the augmentation's strength, each rank's random state, the best metric, the
configuration and the MLflow run. It holds tensors and plain values only and is read with ``weights_only=True``.
Released weights are safetensors whose header carries the configuration and where they come from.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infer.command import UserError
from trainer.config import Config
from trainer.models import AtLevel, Generator, build_generator
from trainer.step import GAN

FORMAT_VERSION = 2
NUM_TO_KEEP = 2
_STATE = "state.pt"
_FOLDER = re.compile(r"checkpoint_\d{9,}")


def folder_name(nimg: int) -> str:
    """Names sort by position."""
    return f"checkpoint_{nimg:012d}"


def position(folder: Path) -> int:
    """Images seen, from a checkpoint folder's name."""
    return int(folder.name.removeprefix("checkpoint_"))


def find_all(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    if not run_dir.is_dir():
        return []
    return sorted(p for p in run_dir.iterdir() if _FOLDER.fullmatch(p.name) and is_checkpoint(p))


def is_checkpoint(folder: Path) -> bool:
    return (folder / _STATE).is_file()


def save(folder: Path, gan: GAN, nimg: int, rng: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Write everything into ``folder``.

    Args:
        rng: random state of each rank, see ``rng_state``.
        extra: best metric, MLflow run id and the like; plain values.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "nimg": nimg,
        "config": gan.config.to_dict(),
        "augment_p": float(gan.p),
        **gan.state_dict(),
        "rng": rng,
        **extra,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU.

    Raises:
        UserError: no checkpoint there, a broken one, or one of another format version.
    """
    path = folder / _STATE
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint (no {_STATE} in it)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        version = state.get("format_version") if isinstance(state, dict) else None
        raise UserError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}")
    return state


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of this process that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_generator(path: Path, generator: Generator, info: dict[str, Any]) -> None:
    """Write the weights as safetensors, atomically; ``info`` (JSON) goes into the header.

    Args:
        info: recipe, kimg, metric, run_id, dataset_digest, config.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    save_file(tensors, temporary, metadata={"catgan": json.dumps({"format_version": FORMAT_VERSION, **info})})
    temporary.replace(path)


def load_generator(path: Path) -> tuple[Generator, dict[str, Any]]:
    """The generator of a run, of its ``best`` folder, of a ``.safetensors`` file or of a checkpoint (its average).

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
    """Released weights at ``path``: itself, or what a run or its ``best`` folder keeps."""
    if path.suffix == ".safetensors":
        return [path] if path.is_file() else []
    return [p for p in (path / "gen.safetensors", path / "best" / "gen.safetensors") if p.is_file()]


def _from_safetensors(path: Path) -> tuple[Generator, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("catgan")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    if header is None:
        raise UserError(f"{path} was not written by this program: its header lacks the configuration")
    info = json.loads(header)
    if info.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {info.get('format_version')}; this program reads version {FORMAT_VERSION}"
        )
    return _generator(info, tensors), info


def _from_checkpoint(folder: Path) -> tuple[Generator, dict[str, Any]]:
    state = load(folder)
    info = {
        "recipe": state["config"]["recipe"],
        "kimg": state["nimg"] / 1000,
        "metric": state.get("last_metric"),
        "run_id": state.get("run_id"),
        "dataset_digest": state.get("dataset_digest"),
        "config": state["config"],
    }
    return _generator(info, state["ema"]), info


def _generator(info: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Generator:
    """One that grows draws as it did at its position, which may be before it was fully grown."""
    config = Config.from_dict(info["config"])
    generator = build_generator(config.model)
    generator.load_state_dict(tensors)
    generator.eval().requires_grad_(False)
    level = config.grow.level(round(info["kimg"] * 1000), config.model.size)
    return AtLevel(generator, level) if generator.grows and level < generator.size.bit_length() - 1 else generator
