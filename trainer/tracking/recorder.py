"""Logging of a training by rank 0: progress lines, metrics, sample grids, the best generator, checkpoints."""

from __future__ import annotations

import importlib.util
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catgan.command import say
from catgan.dataset import Manifest
from catgan.files import atomic_write
from infer.containers import gif_with_xmp
from infer.files import load, save
from infer.provenance import in_training
from infer.walk import FRAME_MS, write_walk
from trainer.checkpoints import checkpoint
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state import Position, save_state
from trainer.checkpoints.storage import Storage
from trainer.step import GAN
from trainer.tracking.alarms import OverfittingCheck, warnings
from trainer.tracking.grids import fake_grid, real_grid
from trainer.tracking.progress import Progress, print_line
from trainer.tracking.tracker import Tracker

_FRAME_MS, _LAST_FRAME_MS = 400, 2500  # of progress.gif


class NullRecorder:
    """Records nothing: the recorder of ranks other than 0."""

    def start(self, gan: GAN, nimg: int) -> None:
        """Training is about to start or continue at ``nimg`` images."""

    def say(self, text: str) -> None:
        """Print a message once, not on every rank."""

    def warn(self, kind: str, text: str) -> None:
        """Log a warning to stderr and MLflow, where ``kind`` groups warnings."""

    def tick(self, values: dict[str, float], nimg: int) -> None:
        """Log means since the last tick."""

    def samples(self, gan: GAN, nimg: int) -> None:
        """Log a grid of samples of the EMA generator."""

    def evaluation(self, gan: GAN, position: Position, is_best: bool, share: float) -> float | None:
        """Log ``position.last_metric``, just measured, and keep the EMA generator if it is the best so far.

        Args:
            share: part of the time since the start that evaluations took.

        Returns:
            ``d/overfitting``, if it was measured.
        """
        return None

    def save(self, gan: GAN, position: Position, rng: list[dict[str, Any]]) -> None:
        """Start to save a checkpoint; ``rng`` is the random state of each rank."""

    def finish(self) -> None:
        """Wait until everything is saved. Raises UserError if that is impossible."""


class Recorder(NullRecorder):
    """Rank 0's recorder: writes to the run's storage and to MLflow."""

    def __init__(
        self,
        manifest: Manifest,
        storage: Storage,
        tracker: Tracker,
        run_id: str | None,
        show: Callable[[Progress], object] = print_line,
    ) -> None:
        self.show = show
        self.manifest, self.storage, self.tracker, self.run_id = manifest, storage, tracker, run_id
        self.saver = Saver(storage, lambda problem: self.warn("save", problem), self._saved)
        self.saving: dict[str, Any] = {}
        self.overfitting = OverfittingCheck(manifest)
        self.nimg = 0
        self.d_loss = math.inf
        self.started_at, self.started = 0, time.perf_counter()

    def start(self, gan: GAN, nimg: int) -> None:
        self.total = round(gan.config.kimg * 1000)
        self.nimg = self.started_at = nimg
        self.started = time.perf_counter()
        self.show(Progress(nimg, self.total, {}))
        self.tracker.rewind(nimg)
        if nimg == 0:
            if path := self._keep("reals.png", real_grid(self.manifest, gan.config)):
                self.tracker.log_artifact(path, "samples")
            gan.recompute_ema_statistics()
            self.samples(gan, nimg)

    def say(self, text: str) -> None:
        say(text)

    def warn(self, kind: str, text: str) -> None:
        say(f"warning: {text}")
        self.tracker.note(kind, text, self.nimg)

    def tick(self, values: dict[str, float], nimg: int) -> None:
        self.nimg, self.d_loss = nimg, values["loss/discriminator"]
        self.saver.poll()
        self.tracker.log_scalars(values, nimg)
        rate = (nimg - self.started_at) / (time.perf_counter() - self.started)
        self.show(Progress(nimg, self.total, values, max(self.total - nimg, 0) / rate))

    def samples(self, gan: GAN, nimg: int) -> None:
        image = fake_grid(gan)
        if path := self._keep(f"samples/fakes_{nimg // 1000:06d}kimg.png", image, in_training()):
            self.tracker.log_grid("fakes", nimg, path)

    def evaluation(self, gan: GAN, position: Position, is_best: bool, share: float) -> float | None:
        result, best = position.last_metric, position.best
        assert result is not None
        assert best is not None
        name, value = result["name"], result["value"]
        signs = {"diversity": result["diversity"], **self.overfitting(gan), **result.get("more", {})}
        speed = {"speed/evaluation_seconds": result["seconds"], "speed/evaluation_share": share}
        self.tracker.log_scalars({name: value, **speed, **signs}, position.nimg)
        if is_best:
            self.saver.keep_best(gan.ema.module.state_dict(), self._origin(gan, best))
        noise = f" +- {result['standard_error']:.2f}" if "standard_error" in result else ""
        say(f"{name} {value:.2f}{noise}" + (" (best so far)" if is_best else f" (best {best['value']:.2f})"))
        for warning in warnings({**signs, "loss/discriminator": self.d_loss}, gan.config, position.nimg):
            self.warn("quality", warning)
        return signs.get("d/overfitting")

    def save(self, gan: GAN, position: Position, rng: list[dict[str, Any]]) -> None:
        state = save_state(gan, position, rng, self.run_id, self.manifest.digest)
        self.saver.save(position.nimg, state)  # which first reports the save before
        metric = checkpoint.origin(state)["metric"]
        self.saving = {"nimg": position.nimg, "recipe": gan.config.recipe, "metric": metric, "best": position.best}

    def _saved(self, kept: list[str]) -> None:
        self.tracker.log_checkpoint(kept=kept, **self.saving)

    def finish(self) -> None:
        self.saver.finish()

    def _origin(self, gan: GAN, metric: dict[str, Any]) -> dict[str, Any]:
        """What the header of released weights says about them."""
        return {
            "recipe": gan.config.recipe,
            "kimg": metric["kimg"],
            "metric": metric,
            "run_id": self.run_id,
            "dataset_digest": self.manifest.digest,
            "config": gan.config.to_dict(),
        }

    def _keep(self, name: str, image: Image.Image, xmp: bytes | None = None) -> Path | None:
        """Write an image, with the XMP packet ``xmp``, into the run's folder; None, with a warning, if the disk refuses
        it."""
        data = io.BytesIO()
        save(image, data, ".png", xmp)
        try:
            self.storage.write(name, data.getvalue())
        except OSError as error:
            self.warn("save", f"{name} not kept in {self.storage.work} ({error.strerror})")
            return None
        return self.storage.work / name


def write_progress(run_dir: Path, longest: int = 640) -> list[Path]:
    """Animations of a run's sample grids in order, the last frame shown longer: ``progress.gif``, and where PyAV is
    installed ``progress.mp4``. Returns the files written: none without a grid. A damaged grid is left out."""
    frames = []
    for path in sorted((run_dir / "samples").glob("fakes_*kimg.png")):
        try:
            frame = load(path)
        except ValueError as error:
            say(f"warning: {path} is not in the animation: {error}")
            continue
        frame.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        frames.append(frame)
    if not frames:
        return []
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    film = run_dir / "progress.gif"
    gif = io.BytesIO()
    frames[0].save(gif, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    atomic_write(film, gif_with_xmp(gif.getvalue(), in_training()))
    if importlib.util.find_spec("av") is None:
        return [film]
    repeated = (np.asarray(f) for f, ms in zip(frames, durations, strict=True) for _ in range(ms // FRAME_MS))
    write_walk(run_dir / "progress.mp4", repeated, in_training())
    return [film, run_dir / "progress.mp4"]
