"""What rank 0 leaves behind for people: progress lines, metrics, sample grids, the best generator, checkpoints."""

from __future__ import annotations

import importlib.util
import io
import itertools
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

from catgan.command import say
from catgan.files import atomic_path
from infer.grid import grid
from infer.latents import latents
from infer.walk import FRAME_MS, write_walk
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.storage import Storage
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images
from trainer.step import GAN
from trainer.tracking.alarms import CriticGap, warnings
from trainer.tracking.tracker import Tracker

_SHOWN_MS, _LAST_SHOWN_MS = 400, 2500


@dataclass
class Position:
    """Where a training stands; part of every checkpoint."""

    nimg: int = 0
    best: dict[str, Any] | None = None
    """The lowest metric so far: the evaluation's result and ``kimg``."""
    last_metric: dict[str, Any] | None = None
    evaluated: float = 0.0
    """Seconds that evaluations took so far."""
    trained: float = 0.0
    """Seconds that training took so far, evaluations included; what was repeated after a loss counts once."""


def generate(gan: GAN, seeds: Sequence[int], average: bool = True) -> Tensor:
    """Pictures of ``seeds`` by the average generator or the live one, rounded like a saved file: uint8
    ``[n, 3, size, size]``; see ``GAN.draw``."""
    z = torch.from_numpy(latents(seeds, gan.generator.z_dim)).to(gan.device)
    return ((gan.draw(z, average).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Recorder:
    """Rank 0's records of one training in its storage and in MLflow."""

    def __init__(self, manifest: Manifest, storage: Storage, tracker: Tracker, run_id: str | None) -> None:
        self.manifest, self.storage, self.tracker, self.run_id = manifest, storage, tracker, run_id
        self.saver = Saver(storage, lambda problem: self.note("save", problem))

    def start(self, gan: GAN, nimg: int) -> None:
        """Before the first step: forget what lies beyond ``nimg``, picture the reals and the initial fakes."""
        self.total = gan.config.kimg * 1000
        self.began, self.began_at, self.nimg = time.perf_counter(), nimg, nimg
        self.gap = CriticGap(self.manifest)
        self.tracker.rewind(nimg)
        if nimg == 0:
            reals = torch.cat(list(itertools.islice(eval_images(self.manifest, "train", batch_size=64), 4)))
            if path := self._keep("reals.png", _grid(reals[: gan.config.track.grid])):
                self.tracker.log_artifact(path, "samples")
            gan.settle_average()
            self._log_samples(gan, nimg)

    def note(self, kind: str, text: str) -> None:
        """Tell people here and in MLflow of something out of the ordinary."""
        say(f"warning: {text}")
        self.tracker.note(kind, text, self.nimg)

    def tick(self, values: dict[str, float], nimg: int) -> None:
        """Log means since the last tick and print a line of progress."""
        self.nimg = nimg
        self.saver.look()
        self.tracker.log_scalars(values, nimg)
        rate = (nimg - self.began_at) / (time.perf_counter() - self.began)
        left = max(self.total - nimg, 0) / rate
        say(
            f"kimg {nimg / 1000:8.2f}/{self.total / 1000:g}"
            f"  {values['speed/images_per_second']:6.0f} images/s"
            f"  loss D {values['loss/discriminator']:7.4f} G {values.get('loss/generator', math.nan):7.4f}"
            f"  D(real) {values['d/real']:+6.2f} D(fake) {values['d/fake']:+6.2f}"
            f"  left {_duration(left)}"
        )

    def snapshot(self, gan: GAN, position: Position, values: dict[str, float]) -> None:
        """Log a sample grid and, if ``values`` are there, the evaluation that has just been made; keep its generator
        if it is the best."""
        self._log_samples(gan, position.nimg)
        if not values:
            return
        result, best = position.last_metric, position.best
        assert result is not None
        assert best is not None
        name, value = result["name"], result["value"]
        signs = {"diversity": result["diversity"], **self.gap(gan)}
        self.tracker.log_scalars(values | {"speed/evaluation_seconds": result["seconds"]} | signs, position.nimg)
        if best is result:
            self.saver.keep_best(gan.ema.module.state_dict(), self._info(gan, best))
        say(f"{name} {value:.2f}" + (" (best so far)" if best is result else f" (best {best['value']:.2f})"))
        for warning in warnings(signs, gan.config, position.nimg):
            self.note("quality", warning)

    def save(self, gan: GAN, position: Position, rng: list[dict[str, Any]]) -> None:
        """Begin to save a checkpoint; ``rng`` is the random state of each rank."""
        state = {
            "nimg": position.nimg,
            "config": gan.config.to_dict(),
            "augment_p": float(gan.p),
            **gan.state_dict(),
            "rng": rng,
            "best": position.best,
            "last_metric": position.last_metric,
            "seconds": {"evaluated": position.evaluated, "trained": position.trained},
            "run_id": self.run_id,
            "dataset_digest": self.manifest.digest,
        }
        self.saver.save(position.nimg, state)

    def _info(self, gan: GAN, best: dict[str, Any]) -> dict[str, Any]:
        return {
            "recipe": gan.config.recipe,
            "kimg": best["kimg"],
            "metric": best,
            "run_id": self.run_id,
            "dataset_digest": self.manifest.digest,
            "config": gan.config.to_dict(),
        }

    def _log_samples(self, gan: GAN, nimg: int) -> None:
        """One grid of the same seeds each time, so that a series of grids shows the training."""
        picture = _grid(generate(gan, range(gan.config.track.grid)))
        if path := self._keep(f"samples/fakes_{nimg // 1000:06d}kimg.png", picture):
            self.tracker.log_grid("fakes", nimg, path)

    def _keep(self, name: str, picture: Image.Image) -> Path | None:
        """Write a picture into the run's folder; None, and a note, if the disk does not take it."""
        data = io.BytesIO()
        picture.save(data, "PNG")
        try:
            self.storage.write(name, data.getvalue())
        except OSError as error:
            self.note("save", f"{name} not kept in {self.storage.work} ({error.strerror})")
            return None
        return self.storage.work / name


def _grid(pictures: Tensor) -> Image.Image:
    return grid(np.ascontiguousarray(pictures.cpu().permute(0, 2, 3, 1).numpy()))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def write_progress(run_dir: Path, longest: int = 640) -> list[Path]:
    """Films of the sample grids of a run, in order, the last one shown longer: ``progress.gif``, and where PyAV is
    installed ``progress.mp4``. Returns those that were written: none without a grid."""
    frames = []
    for path in sorted((run_dir / "samples").glob("fakes_*kimg.png")):
        with Image.open(path) as image:
            frame = image.convert("RGB")
        frame.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        frames.append(frame)
    if not frames:
        return []
    durations = [_SHOWN_MS] * (len(frames) - 1) + [_LAST_SHOWN_MS]
    film = run_dir / "progress.gif"
    with atomic_path(film) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    if importlib.util.find_spec("av") is None:
        return [film]
    repeated = (np.asarray(f) for f, ms in zip(frames, durations, strict=True) for _ in range(ms // FRAME_MS))
    write_walk(run_dir / "progress.mp4", repeated)
    return [film, run_dir / "progress.mp4"]
