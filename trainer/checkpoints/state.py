"""The state of a training, as a checkpoint holds it: collecting it and restoring it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from catgan.command import UserError
from trainer.config import Config
from trainer.step import GAN


@dataclass
class Position:
    """Progress of a training and its metrics."""

    nimg: int = 0
    """Images seen."""
    best: dict[str, Any] | None = None
    """The lowest metric so far: the evaluation's result and ``kimg``."""
    last_metric: dict[str, Any] | None = None
    """The latest evaluation."""
    overfitting: float | None = None
    """``d/overfitting`` then, if it was measured."""


def save_state(
    gan: GAN, position: Position, rng: list[dict[str, Any]], run_id: str | None, dataset_digest: str
) -> dict[str, Any]:
    """All that ``restore`` and an export need.

    Args:
        rng: ``rng_state`` of each rank.
        run_id: identifies the run in MLflow.
        dataset_digest: identifies the data set.
    """
    return {
        "nimg": position.nimg,
        "config": gan.config.to_dict(),
        **gan.state_dict(),
        "rng": rng,
        "best": position.best,
        "last_metric": position.last_metric,
        "overfitting": position.overfitting,
        "run_id": run_id,
        "dataset_digest": dataset_digest,
    }


def restore(state: dict[str, Any], gan: GAN, rank: int, world_size: int) -> Position:
    """Continue from ``state``: fill ``gan`` and set this process's random state.

    With another number of ranks than the checkpoint's, each rank's random state follows from the position instead.
    """
    gan.load_state_dict(state)
    gan.schedule(state["nimg"])
    if len(state["rng"]) == world_size:
        _set_rng_state(state["rng"][rank], gan.device)
    else:
        seed_rank(gan.config.seed, rank, state["nimg"])
    return position_in(state)


def position_in(state: dict[str, Any]) -> Position:
    """The position of a checkpoint; one from before ``overfitting`` was kept has none."""
    return Position(state["nimg"], state["best"], state["last_metric"], state.get("overfitting"))


def check_fits(config: Config, state: dict[str, Any], origin: str) -> None:
    """Raise UserError unless networks and optimisers of ``config`` can take over those of ``state``."""
    own, saved = config.to_dict(), Config.from_dict(state["config"]).to_dict()
    if (saved["model"], saved["grow"], saved["optim"]["name"]) != (own["model"], own["grow"], own["optim"]["name"]):
        raise UserError(
            f"checkpoint {origin} has another model, growth or optimiser than this configuration; give the same"
            " --model, --grow and --optim.name options, or another --name to start from scratch"
        )
    if own["projected"]["weight"] and "projected" in state:
        strides = saved["projected"]["strides"]
        if list(strides) != list(own["projected"]["strides"]):
            raise UserError(
                f"checkpoint {origin} has a projected discriminator with other maps: give --projected.strides"
                f" {' '.join(map(str, strides))}, or another --name to start from scratch"
            )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's random number generators that training uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_rank(seed: int, rank: int, nimg: int) -> None:
    """Seed latents and augmentation of this rank with a number that no other rank or position shares."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{rank}/{nimg}".encode()).digest()[:7], "big"))
