"""Our train stream against torchvision's ImageFolder + DataLoader and against plain webdataset: the same pictures."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from measure import Work, compare, count, device, machine, positive, table
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor, ToTensor

from catgan.command import Parser, run_command, say
from trainer.data.build.shards import write_shards
from trainer.data.drawn.synth import draw_many
from trainer.data.manifest import Manifest
from trainer.data.stream import eval_images, train_batches

NAME = "loader.py"
BATCH = 64
BUFFER = 2000
SEGMENT = 20_000 // BATCH  # batches; our stream is seeded afresh, and its buffer filled, at each snapshot
SETTLE = 12  # batches; more than any of the loaders has read ahead
OURS, DECODING = "ours", "ours, decoding"
FOLDER_FLOAT, FOLDER_UINT8, WEBDATASET = "ImageFolder ToTensor", "ImageFolder uint8", "webdataset uint8"
MEMORY = 2 << 30

_DESCRIPTION = f"""\
Images per second of reading shuffled batches of {BATCH}, with nothing else to do, over the same drawn cats:

  {OURS:22s}trainer.data.stream.train_batches: uint8 batches, decoded in the first epoch and kept in shared memory
  {DECODING:22s}the same with --loader.memory-mib 0, as a set that is too large reads: lossless WebP from shards
  {FOLDER_FLOAT:22s}torchvision's ImageFolder over PNG files, DataLoader, ToTensor: float32, as users write it
  {FOLDER_UINT8:22s}the same with PILToTensor: uint8 like ours, a quarter of the bytes to hand over
  {WEBDATASET:22s}WebDataset(...).shuffle(...).decode("pil") over our shards, DataLoader, PILToTensor

`ratio` is ours over another's speed, the lowest of all sizes, workers and others; `ratio_decoding` is that of decoding
each time. Files and shards were just written,
so they come from memory: what one large file saves on a slow disk or over a network is not in these numbers.

examples:
  python benchmarks/loader.py
  python benchmarks/loader.py --sizes 64 --workers 0 2 4
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[32, 64, 128], metavar="PX", help="sides (default: 32 64 128)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        choices=range(65),
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="reader processes, 0 to 64; 0 reads in this process (default: 0 1)",
    )
    parser.add_argument("--num", type=count, default=2048, metavar="N", help="cats to draw (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=positive, default=2, metavar="S", help="length of a turn (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.num < 2 * BATCH:
        parser.error(f"--num {a.num}: give {2 * BATCH} or more")
    device()
    results = []
    for size in a.sizes:
        with tempfile.TemporaryDirectory() as folder:
            manifest = _draw(Path(folder), a.num, size)
            for workers in a.workers:
                result = _measure(manifest, Path(folder, "files"), workers, a.seconds, a.repeats)
                results.append({"size": size, "workers": workers} | result)
    table(
        ("size", "workers", *(f"{way}/s" for way in results[0]["images_per_second"]), "ratio", "decoding"),
        [(r["size"], r["workers"], *r["images_per_second"].values(), r["ratio"], r["ratio_decoding"]) for r in results],
    )
    lowest = {name: min(r[name] for r in results) for name in ("ratio", "ratio_decoding")}
    return {"results": results, **lowest, "machine": machine()}


def _draw(folder: Path, num: int, size: int) -> Manifest:
    """Drawn cats as shards, and those of the train split as PNG files in one class of an ImageFolder."""
    say(f"drawing {num} cats at {size}x{size}")
    manifest = write_shards(folder / "shards", draw_many(0, num, size), size=size)
    files = folder / "files" / "cats"
    files.mkdir(parents=True)
    pictures = itertools.chain.from_iterable(eval_images(manifest, "train"))
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(files / f"{i:06d}.png")
    return manifest


def _measure(manifest: Manifest, files: Path, workers: int, seconds: float, repeats: int) -> dict[str, Any]:
    """The comparison with so many reader processes. They end when the streams go, on return."""
    segment = SEGMENT - SEGMENT % max(workers, 1)  # train_batches takes a divisor of it as the number of readers
    ours, decoding = (
        train_batches(
            manifest,
            rank=0,
            seed=0,
            nimg=0,
            batch=BATCH,
            batches_per_segment=segment,
            images_per_segment=segment * BATCH,
            readers=workers,
            buffer=BUFFER,
            memory=memory,
        )
        for memory in (MEMORY, 0)
    )
    for _ in range(
        -(-2 * manifest.splits["train"].images // BATCH)
    ):  # the first epoch decodes, and is not the question
        next(ours)
    ways: dict[str, Work] = {
        OURS: partial(_read, ours),
        DECODING: partial(_read, decoding),
        FOLDER_FLOAT: partial(_read, _endless(_image_folder(files, ToTensor(), workers))),
        FOLDER_UINT8: partial(_read, _endless(_image_folder(files, PILToTensor(), workers))),
        WEBDATASET: partial(_read, _endless(_webdataset(manifest.paths("train"), workers))),
    }
    what = f"{manifest.size}x{manifest.size}, {workers} workers"
    result = compare(what, ways, seconds=seconds, repeats=repeats, settle=SETTLE)
    others = [name for name in ways if name not in (OURS, DECODING)]
    ratios = result["ratios"]
    # Both are relative to ours in the same rounds, so their quotient is decoding relative to another.
    return result | {
        "ratio": min(ratios[name] for name in others),
        "ratio_decoding": round(min(ratios[name] for name in others) / ratios[DECODING], 3),
    }


def _read(stream: Iterator[Any]) -> int:
    next(stream)
    return BATCH


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def _image_folder(files: Path, transform: Any, workers: int) -> DataLoader[Any]:
    return DataLoader(
        ImageFolder(str(files), transform=transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _webdataset(shards: list[str], workers: int) -> DataLoader[Any]:
    pictures = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .repeat()
        .shuffle(BUFFER)
        .decode("pil")
        .to_tuple("webp")
        .map_tuple(PILToTensor())
    )
    return DataLoader(pictures, batch_size=BATCH, num_workers=workers)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
