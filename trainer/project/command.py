"""The work of `cattrain project`: from photos to files with latents."""

from __future__ import annotations

import collections
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from catgan.command import UserError, say
from catgan.files import atomic_open
from infer.files import make_writable
from infer.grid import grid, to_uint8
from infer.latentfile import write_latent
from infer.walk import write_walk
from trainer.data.build.members import MAX_BYTES
from trainer.data.build.prepare import OPTIONAL_CHECKS, Options, prepare
from trainer.data.build.store import Rejected
from trainer.models import Generator
from trainer.project.search import Found, image, search

_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Order:
    """What `cattrain project` does.

    Attributes:
        photos: paths of images.
        out: the folder for the files, made if missing.
        crop: "center", "none" or "face", as of `catdata build`.
        starts, steps, seed: see ``trainer.project.search.search``.
        film: "gif" or "webp" for a film of each search, or None.
    """

    photos: Sequence[str]
    out: Path
    crop: str
    starts: int
    steps: int
    seed: int
    film: str | None


def project(generator: Generator, weights_sha256: str, order: Order) -> list[dict[str, Any]]:
    """Write ``<photo's name>.latent.npz`` and ``.projected.png`` (photo and result), and a film if ordered, for each
    photo. All photos are read before the first search.

    Args:
        generator: in evaluation mode, on the CPU.
        weights_sha256: recorded in the files.

    Returns:
        A JSON object for each photo: photo, latent, projected, film (if ordered), loss, norm, nearest_seed and its
        nearest_seed_loss.

    Raises:
        UserError: two photos would give files of the same name, a photo cannot be used, or a file cannot be written.
    """
    if getattr(generator, "classes", ()):
        raise UserError("the generator has classes, and a latent is searched for generators without: give another one")
    names = collections.Counter(Path(photo).stem for photo in order.photos)
    for name, count in names.items():
        if count > 1:
            raise UserError(f"{count} photos are named {name}: their files would replace each other; rename them")
    try:
        make_writable(order.out)
    except OSError as error:
        raise UserError(f"--out {order.out}: cannot be written ({error.strerror})") from error
    targets = [_square(photo, generator.size, order.crop) for photo in order.photos]
    return [
        _project(generator, weights_sha256, order, photo, target)
        for photo, target in zip(order.photos, targets, strict=True)
    ]


def _square(photo: str, size: int, crop: str) -> np.ndarray:
    """The photo as a sample of a data set, uint8 ``[size, size, 3]``, without the checks of its quality."""
    path = Path(photo)
    if path.is_dir():
        raise UserError(f"{photo}: is a folder; give the images in it")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{photo}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{photo}: too large, at most {MAX_BYTES:,} bytes")
    # The least size is that of `catdata build`.
    result = prepare(content, Options(size, crop, min_size=size // 2, keep=tuple(OPTIONAL_CHECKS)))[0]
    if isinstance(result, Rejected):
        advice = "; give a photo of one cat from the front, or --crop center" if result.reason == "no face" else ""
        raise UserError(f"{photo}: {result.reason}{advice}")
    return np.asarray(Image.open(io.BytesIO(result.image)).convert("RGB"))


def _project(generator: Generator, weights_sha256: str, order: Order, photo: str, pixels: np.ndarray) -> dict[str, Any]:
    target = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    progress = _Progress(photo, order.steps)
    found = search(generator, target, order.starts, order.steps, order.seed, progress.report)
    if not math.isfinite(found.loss):
        raise UserError("the generator gives values that are not finite; its weights are unusable")
    say(f"{photo}: loss {found.loss:.3f}, {found.seed_loss:.3f} for the nearest seed, {found.seed}")
    stem = Path(photo).stem
    files = {"latent": f"{stem}.latent.npz", "projected": f"{stem}.projected.png"}
    if order.film:
        files["film"] = f"{stem}.search.{order.film}"
    paths = {kind: order.out / name for kind, name in files.items()}
    results = _pixels(generator, found.path)
    pairs = [np.concatenate([pixels, result], axis=1) for result in results]
    if order.film:
        write_walk(paths["film"], iter([*pairs, *[pairs[-1]] * 20]))  # the result for a second
    with atomic_open(paths["projected"]) as file:
        grid(pairs[-1][None]).save(file, "PNG")
    write_latent(paths["latent"], found.z.numpy(), weights_sha256, found.loss)
    return {"photo": photo, **{kind: str(path) for kind, path in paths.items()}, **_numbers(found)}


def _pixels(generator: Generator, z: Tensor) -> np.ndarray:
    """uint8 ``[n, size, size, 3]``."""
    with torch.no_grad():
        return to_uint8(np.concatenate([image(generator, part).numpy() for part in z.split(16)]))


def _numbers(found: Found) -> dict[str, Any]:
    return {
        "loss": round(found.loss, 4),
        "norm": round(float(found.z.norm()), 3),
        "nearest_seed": found.seed,
        "nearest_seed_loss": round(found.seed_loss, 4),
    }


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, photo: str, steps: int) -> None:
        self._photo, self._steps = photo, steps
        self._start = self._reported = time.perf_counter()
        say(f"{photo}: comparing random latents")

    def report(self, step: int, loss: float) -> None:
        now = time.perf_counter()
        if step == 1:
            self._start = now  # the comparison is not part of the speed
        elif now - self._reported >= _REPORT_SECONDS and step < self._steps:
            self._reported = now
            left = round((now - self._start) / (step - 1) * (self._steps - step))
            say(f"{self._photo}: step {step}/{self._steps}, loss {loss:.3f}, {left // 60}:{left % 60:02d} min left")
