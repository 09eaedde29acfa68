"""The trainings of race.py behind one interface, and the clock that they run by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from measure import wait_for_device
from plain_dcgan import Z_DIM, PlainDCGAN
from torch import Tensor

from catgan.command import say
from infer.grid import grid
from infer.latents import latents
from trainer.config import Config
from trainer.ema import EMA
from trainer.recipes import resolve
from trainer.step import GAN
from trainer.tracking.recorder import generate

PLAIN = "plain"
PLAIN_BATCH = 64
GRID = 64  # pictures in a sample grid
STEPS_PER_LOOK = 10  # at the clock, where looking means waiting for a GPU

Pictures = Callable[[Sequence[int]], Tensor]
"""Makes the pictures of some seeds, uint8 ``[len(seeds), 3, size, size]``."""


class Judge(Protocol):
    """How good are pictures? See ``race_judge.Judge``."""

    def measure(self, pictures: Pictures) -> dict[str, float]: ...

    def distance(self, pictures: Pictures) -> float: ...


@dataclass
class Contestant:
    """A training in progress."""

    batch: int
    step: Callable[[int], object]
    """``step(nimg)`` trains on one batch, the average included."""
    settle: Callable[[], object]
    """Makes the average fit to draw; called before it does."""
    average: Pictures
    live: Pictures


def plain_contestant(pictures: Tensor, place: torch.device) -> Contestant:
    """The plain loop on ``pictures``, uint8 ``[n, 3, size, size]``, with the average of the recipe dcgan."""
    size = pictures.shape[-1]
    plain = PlainDCGAN(size, place)
    rule = resolve("dcgan", size, gpu=False).ema
    ema = EMA(plain.generator, rule.half_life_kimg * 1000, rule.ramp)

    def step(nimg: int) -> None:
        plain.step(_draw(pictures, PLAIN_BATCH))
        ema.update(plain.generator, PLAIN_BATCH, nimg + PLAIN_BATCH)

    @torch.no_grad()
    def make(average: bool, seeds: Sequence[int]) -> Tensor:
        # Batch norm with its running statistics, as a shipped generator has them.
        module = (ema.module if average else plain.generator).eval()
        made = module(torch.from_numpy(latents(seeds, Z_DIM)).to(place))
        plain.generator.train()
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def settle() -> None:
        random = torch.Generator().manual_seed(0)
        ema.settle(torch.randn(64, Z_DIM, generator=random).to(place) for _ in range(16))

    return Contestant(PLAIN_BATCH, step, settle, partial(make, True), partial(make, False))


def recipe_contestant(config: Config, pictures: Tensor, place: torch.device) -> Contestant:
    """A recipe of ours on ``pictures``, uint8 ``[n, 3, size, size]``, as ``trainer.loop`` trains it."""
    gan = GAN(config, place)

    def step(nimg: int) -> None:
        more_reals = _draw(pictures, config.batch) if gan.fresh_reals else None
        gan.step(_draw(pictures, config.batch), nimg, more_reals)
        gan.ema.update(gan.generator, config.batch, nimg + config.batch)

    average, live = (partial(generate, gan, average=average) for average in (True, False))
    return Contestant(config.batch, step, gan.settle_average, average, live)


def _draw(pictures: Tensor, batch: int) -> Tensor:
    return pictures[torch.randint(len(pictures), (batch,), device=pictures.device)]


def train(
    contestant: Contestant, label: str, minutes: float, intervals: int, judge: Judge, sheets: Callable[[int], Path]
) -> dict[str, Any]:
    """Train for ``minutes`` by a clock that stands still during evaluations.

    Args:
        label: what the lines on stderr begin with.
        intervals: evaluations, at equal intervals of training time, the last one at the end.
        sheets: the file for the sample grid of evaluation 1, 2, ...

    Returns:
        ``curve`` with a point for each evaluation, ``images_per_second``, ``kimg`` and ``seconds`` of training.
    """
    curve: list[dict[str, Any]] = []
    nimg, trained = 0, 0.0
    steps = STEPS_PER_LOOK if torch.cuda.is_available() else 1
    for i in range(1, intervals + 1):
        until = minutes * 60 * i / intervals
        while trained < until:
            began = time.perf_counter()
            for _ in range(steps):
                contestant.step(nimg)
                nimg += contestant.batch
            wait_for_device()
            trained += time.perf_counter() - began
        contestant.settle()
        point = {
            "minutes": round(trained / 60, 3),
            "kimg": round(nimg / 1000, 3),
            **judge.measure(contestant.average),
            "distance_live": judge.distance(contestant.live),
        }
        save_sheet(contestant.average, sheets(i))
        say(describe(label, point, minutes, nimg / trained))
        curve.append(point)
    return {
        "curve": curve,
        "images_per_second": round(nimg / trained, 1),
        "kimg": curve[-1]["kimg"],
        "seconds": round(trained, 2),
    }


def describe(label: str, point: dict[str, Any], minutes: float, rate: float | None) -> str:
    """The line for people about one evaluation."""
    return (
        f"{label}: {point['minutes']:.2f} of {minutes:g} minutes"
        + (f", {point['kimg']:g} kimg at {rate:.0f} images/s" if rate is not None else "")
        + f", distance {point['distance']:g}"
        + (f" (live {point['distance_live']:g})" if point["distance_live"] is not None else "")
        + f", kid {point['kid']:g}, precision {point['precision']:.3f}, recall {point['recall']:.3f}"
    )


def save_sheet(pictures: Pictures, path: Path, num: int = GRID) -> None:
    """The pictures of the seeds from 0 on as one sample grid."""
    shown = pictures(range(num)).permute(0, 2, 3, 1).cpu().numpy()
    grid(np.ascontiguousarray(shown)).save(path)
