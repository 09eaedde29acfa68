"""How fast are training batches read from shards, compared with ImageFolder and with plain webdataset?

Reads shuffled batches of 64 of the same drawn cats, with nothing else to do:

  ours                  trainer.data.stream.TrainStream, uint8; decoded once, then kept in shared memory
  ours, decoding        the same with --loader.memory-mib 0: lossless WebP from shards, decoded every time
  ImageFolder ToTensor  torchvision's ImageFolder over PNG files, DataLoader, ToTensor: float32, as users write it
  ImageFolder uint8     the same with PILToTensor: a quarter of the bytes
  webdataset uint8      WebDataset(...).shuffle(...).decode("pil") over our shards, DataLoader, PILToTensor

  ratio           our images/s over the fastest alternative's, the lowest of all settings; above 1 ours is faster
  ratio_decoding  the same when ours decodes every time

Files and shards were just written, so they are read from memory: a slow disk or a network, where one large file beats
many small ones, is not measured.

examples:
  python benchmarks/loader.py
  python benchmarks/loader.py --sizes 64 --workers 0 2 4
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from measure import Work, add_turn_options, compare, count, device, machine, table
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor, ToTensor

from catgan.command import Parser, number, run_command, say
from catgan.dataset import Manifest
from trainer.config import LoaderConfig
from trainer.data.build.shards import write_shards
from trainer.data.drawn.synth import draw_many
from trainer.data.stream import StreamPosition, TrainStream, eval_images

BATCH = 64
BUFFER = 2000
SEGMENT = 20_000 // BATCH  # batches; at each snapshot our stream is seeded again and fills its buffer
SETTLE = 12  # batches; more than any of the loaders reads ahead
OURS, DECODING = "ours", "ours, decoding"
FOLDER_FLOAT, FOLDER_UINT8, WEBDATASET = "ImageFolder ToTensor", "ImageFolder uint8", "webdataset uint8"
MEMORY_MIB = 2048


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/loader.py", __doc__)
    add = parser.add_argument
    add("--sizes", type=count, nargs="+", default=[32, 64, 128], metavar="PX", help="sides (default: 32 64 128)")
    add(
        "--workers",
        type=number(int, 0, 64),
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="reader processes; 0 reads in this process (default: 0 1)",
    )
    add("--num", type=count, default=2048, metavar="N", help="cats to draw (default: %(default)s)")
    add_turn_options(parser, seconds=2)
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
    """Write drawn cats as shards, and the train split also as PNG files in one class of an ImageFolder."""
    say(f"drawing {num} cats at {size}x{size}")
    manifest = write_shards(folder / "shards", draw_many(0, num, size), size=size)
    files = folder / "files" / "cats"
    files.mkdir(parents=True)
    for i, image in enumerate(itertools.chain.from_iterable(eval_images(manifest, "train"))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files / f"{i:06d}.png")
    return manifest


def _measure(manifest: Manifest, files: Path, workers: int, seconds: float, repeats: int) -> dict[str, Any]:
    """The comparison with this number of reader processes. They end with the streams, on return."""
    segment = SEGMENT - SEGMENT % max(workers, 1)  # the number of readers must divide it
    start = StreamPosition(
        seed=0, rank=0, nimg=0, batch=BATCH, batches_per_segment=segment, images_per_segment=segment * BATCH
    )
    ours, decoding = (
        TrainStream(manifest, start, LoaderConfig(workers=workers, shuffle_buffer=BUFFER, memory_mib=memory))
        for memory in (MEMORY_MIB, 0)
    )
    for _ in range(-(-2 * manifest.splits["train"].images // BATCH)):  # not counted: the first epoch decodes
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
    # Both ratios are relative to ours in the same rounds, so their quotient compares decoding with the other.
    return result | {
        "ratio": min(ratios[name] for name in others),
        "ratio_decoding": round(min(ratios[name] for name in others) / ratios[DECODING], 3),
    }


def _read(stream: Iterator[Any]) -> int:
    next(stream)
    return BATCH


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
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
    images = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .repeat()
        .shuffle(BUFFER)
        .decode("pil")
        .to_tuple("webp")
        .map_tuple(PILToTensor())
    )
    return DataLoader(images, batch_size=BATCH, num_workers=workers)


if __name__ == "__main__":
    run_command("loader.py", main)
