"""How fast does each recipe train on this GPU, and what do finite differences and torch.compile gain?

Measures trainer.step.GAN with each recipe at its own batch, EMA update included, on uint8 images from pinned memory,
against other ways of the same training, in alternating turns:

  plain      the DCGAN loop of plain_dcgan.py with the same batch and settings of the GPU (other networks than most
             recipes have)
  finite     R1 and R2 by finite differences, where the recipe has them by differentiating twice
  compiled   the recipe compiled, with finite differences if it has R1 and R2 (--compiled names recipes: it takes a
             minute each)

Recipes run without the projected discriminator. What is not begun within --minutes is left out and named, the sizes
come one after the other, 64 first. The table has images/s of each way, seconds for a thousand images, and
peak memory of the recipe's own. With webdataset installed, a last line has the share of the time in which training
waits for the loader's images. The JSON line is also written to out/gpu-NAME.json, NAME being that of the GPU.

examples:
  make gpu                                                the tests on the GPU, then this
  python benchmarks/gpu.py --recipes r3gan --sizes 64 --compiled r3gan-64
  python benchmarks/gpu.py --cpu --recipes dcgan-cpu --sizes 32 --seconds 1        try the script without a GPU
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, Work, add_turn_options, compare, device, machine, table, wait_for_device
from plain_dcgan import PlainDCGAN
from torch import Tensor

from catgan.command import Parser, UserError, number, run_command, say
from trainer.config import Config, LoaderConfig, ProjectedConfig
from trainer.models import full_resolution_kimg
from trainer.networks import set_up_device
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.step import GAN

SETTLE = 2
WAIT_SECONDS = 5


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/gpu.py", __doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME", help="families; default: all")
    add(
        "--sizes", nargs="+", type=int, choices=SIZES, default=[64, 32, 128], help="sides in pixels; default: 64 32 128"
    )
    add(
        "--minutes",
        type=number(float, 0.01, 600),
        default=5.0,
        help="begin nothing later than this; default: %(default)s",
    )
    add("--compiled", nargs="*", default=["dcgan-64", "r3gan-64"], metavar="NAME", help="default: %(default)s")
    add("--out", default=str(ROOT / "out"), metavar="FOLDER", help="of the JSON file; default: out")
    add("--cpu", action="store_true", help="without a GPU")
    add_turn_options(parser, seconds=0.7)
    parser.set_defaults(repeats=3)
    a = parser.parse_args(argv)
    if not (a.cpu or torch.cuda.is_available()):
        raise UserError("there is no CUDA GPU that this PyTorch can use; --cpu tries the script without one")
    place = device()
    recipes = [f"{family}-{size}" for size in a.sizes for family in a.recipes]
    end = time.monotonic() + 60 * a.minutes
    rows = [_measure(recipe, place, a) for recipe in recipes if time.monotonic() < end]
    for row in rows:
        row["ratio_to_plain"] = row["ratios"]["plain"]
    ways = ("recipe", "plain", "finite", "compiled")
    table(
        ("recipe", "batch", *(f"{way} images/s" for way in ways), "s/kimg", "peak GiB"),
        [
            (
                row["recipe"],
                row["batch"],
                *(row["images_per_second"].get(way, "") for way in ways),
                row["seconds_per_kimg"],
                row["peak_gib"],
            )
            for row in rows
        ],
    )
    if left_out := recipes[len(rows) :]:
        say(f"not measured, {a.minutes:g} minutes are over: {', '.join(left_out)}")
    ratio = min(row["ratio_to_plain"] for row in rows)
    result = {"machine": machine(), "results": rows, "left_out": left_out, "ratio": ratio}
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu").strip("-")
    path = Path(a.out) / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if find_spec("webdataset"):
        result["data_wait"] = _data_wait(resolve("dcgan-64", None, gpu=True), place)
        say(
            f"dcgan-64 from shards with decoded images in memory waits {result['data_wait']:.1%} of the time for images"
        )
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result | {"out": str(path)}


def _measure(recipe: str, place: torch.device, a: Any) -> dict[str, Any]:
    """Speeds of the recipe and of the other ways to train it."""
    config = replace(resolve(recipe, None, gpu=True), projected=ProjectedConfig())
    loss = config.loss
    finite = replace(config, loss=replace(loss, penalty="finite-difference")) if loss.gamma.start > 0 else None
    torch.manual_seed(0)
    images = torch.randint(256, (2 * config.batch, 3, *[config.model.size] * 2), dtype=torch.uint8)
    images = images.pin_memory() if torch.cuda.is_available() else images
    plain = PlainDCGAN(config.model.size, place)
    batch = config.batch
    ways: dict[str, Work] = {"recipe": _trainer(config, images, place)}
    ways["recipe"]()
    if torch.cuda.is_available():  # cuDNN's trials are over
        torch.cuda.reset_peak_memory_stats()
    ways["recipe"]()
    wait_for_device()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    ways["plain"] = lambda: plain.step(images[:batch]) and batch
    if finite:
        ways["finite"] = _trainer(finite, images, place)
    seconds = None
    if recipe in a.compiled:
        ways["compiled"] = _trainer(replace(finite or config, compile=True), images, place)
        began = time.perf_counter()
        ways["compiled"]()
        wait_for_device()
        seconds = round(time.perf_counter() - began, 1)
    found = compare(recipe, ways, seconds=a.seconds, repeats=a.repeats, settle=SETTLE)
    return {
        "recipe": recipe,
        "batch": batch,
        **found,
        "seconds_per_kimg": round(1000 / found["images_per_second"]["recipe"], 3),
        "peak_gib": round(peak, 2),
        "compile_seconds": seconds,
    }


def _trainer(config: Config, images: Tensor, place: torch.device) -> Callable[[], int]:
    """A function that takes the steps of ``config`` at full resolution after which its lazy penalties come again: parts
    of such a cycle would have one by chance."""
    loss = config.loss
    cycle = math.lcm(loss.n_critic, loss.penalty_every, loss.path_every if loss.path_length else 1)
    set_up_device(config, place)
    gan = GAN(config, place)
    nimg = round(full_resolution_kimg(config) * 1000)
    reals, more_reals = images.split(config.batch)

    def step() -> int:
        nonlocal nimg
        for _ in range(cycle):
            gan.step(reals, nimg, more_reals if gan.fresh_reals else None)
            nimg += config.batch
            gan.ema.update(gan.generator, config.batch, nimg)
        return cycle * config.batch

    return step


def _data_wait(config: Config, place: torch.device) -> float:
    """The share of the time in which a training waits for images of drawn cats, from the second epoch on."""
    from trainer.data.open import open_data
    from trainer.data.stream import StreamPosition, TrainStream

    loader = LoaderConfig(workers=1)
    manifest = open_data(None, config.model.size, loader)
    batches_per_segment = manifest.splits["train"].images // config.batch
    at = StreamPosition(
        seed=0,
        rank=0,
        nimg=0,
        batch=config.batch,
        batches_per_segment=batches_per_segment,
        images_per_segment=batches_per_segment * config.batch,
    )
    gan, waited = GAN(config, place), 0.0
    stream = TrainStream(manifest, at, loader, pin_memory=place.type == "cuda")
    try:
        for _ in range(batches_per_segment + 1):
            reals = next(stream)
        gan.step(reals, 0)
        wait_for_device()
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < WAIT_SECONDS:
            reals = next(stream)
            waited += time.perf_counter() - now
            gan.step(reals, 0)
        wait_for_device()
        return round(waited / (time.perf_counter() - began), 4)
    finally:
        stream.close()


if __name__ == "__main__":
    run_command("gpu.py", main)
