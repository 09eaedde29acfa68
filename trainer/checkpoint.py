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
from trainer.models import Generator, build_generator
from trainer.step import GAN

FORMAT_VERSION = 1
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
    return sorted(p for p in run_dir.iterdir() if _FOLDER.fullmatch(p.name) and (p / _STATE).is_file())


def save(folder: Path, gan: GAN, nimg: int, rng: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Write everything into ``folder``.

    Args:
        rng: random state of each rank, see ``rng_state``.
        extra: best metric, MLflow run id and the like; plain values.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "nimg": nimg,
        "num_steps": gan.num_steps,
        "config": gan.config.to_dict(),
        "augment_p": gan.config.augment.p(nimg),
        "generator": gan.generator.state_dict(),
        "discriminator": gan.discriminator.state_dict(),
        "ema": gan.ema.module.state_dict(),
        "g_optimiser": gan.g_optimiser.state_dict(),
        "d_optimiser": gan.d_optimiser.state_dict(),
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


def restore(gan: GAN, state: dict[str, Any]) -> None:
    """Put a checkpoint's state into ``gan``, whose model configuration must be the checkpoint's."""
    gan.generator.load_state_dict(state["generator"])
    gan.discriminator.load_state_dict(state["discriminator"])
    gan.ema.module.load_state_dict(state["ema"])
    gan.g_optimiser.load_state_dict(state["g_optimiser"])
    gan.d_optimiser.load_state_dict(state["d_optimiser"])
    gan.num_steps = state["num_steps"]


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
    if path.is_file() and path.suffix == ".safetensors":
        return _from_safetensors(path)
    for candidate in (path / "gen.safetensors", path / "best" / "gen.safetensors"):
        if candidate.is_file():
            return _from_safetensors(candidate)
    if (path / _STATE).is_file():
        return _from_checkpoint(path)
    if found := find_all(path):
        return _from_checkpoint(found[-1])
    raise UserError(
        f"{path} holds no generator; give a run's folder, its best/ folder, a gen.safetensors or a checkpoint folder"
    )


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
    return _generator(info["config"], tensors), info


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
    return _generator(state["config"], state["ema"]), info


def _generator(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Generator:
    generator = build_generator(Config.from_dict(config).model)
    generator.load_state_dict(tensors)
    return generator.eval().requires_grad_(False)
