"""Runs that are made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from catgan.dataset import Manifest
from trainer.checkpoints import checkpoint
from trainer.checkpoints.state import Position, rng_state, save_state
from trainer.checkpoints.storage import Storage
from trainer.launch.options import parse
from trainer.recipes import resolve
from trainer.step import GAN

OPTIONS = ["--model.g-width", "4", "--model.d-width", "4", "--batch", "8", "--eval.num", "32", "--track.offline"]
"""Of a training with a tiny network of the recipe dcgan-cpu-32."""


def save_checkpoint(folder: Path, data: Path, nimg: int, is_evaluated: bool = True) -> Path:
    """Save a checkpoint at ``nimg`` images, as of a training with ``OPTIONS``, in the run's ``folder``."""
    config = parse(OPTIONS, resolve("dcgan-cpu-32", None, gpu=False), "").config()
    gan, cpu = GAN(config, torch.device("cpu"), world_size=1), torch.device("cpu")
    result = {"name": "fd32_efflite0", "value": 9.0, "kimg": nimg / 1000}
    position = Position(nimg, result if is_evaluated else None, result if is_evaluated else None)
    state = save_state(gan, position, [rng_state(cpu)], "the-run", Manifest.load(data).digest)
    Storage(folder).save(checkpoint.folder_name(nimg), checkpoint.encode(state))
    return folder / checkpoint.folder_name(nimg)


def content(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below ``folder``."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
