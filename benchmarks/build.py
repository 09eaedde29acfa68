"""``catdata build`` against a plain Pillow loop over the same photos."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import Work, compare, count, machine, positive, table
from PIL import Image

from catgan.command import Parser, run_command
from catgan.machine import cores
from trainer.data.build.build import build
from trainer.data.build.progress import progress

NAME = "build.py"
OURS, ONE_PROCESS, LOOP = "catdata build", "catdata build, 1 process", "Pillow loop"

_DESCRIPTION = f"""\
Images per second and core of making pictures of --size from JPEG photos that are drawn for it:

  {OURS:26s}the command, from its start to its end, with all cores; divided by their number
  {ONE_PROCESS:26s}the same work in a process that runs already, without helpers
  {LOOP:26s}open, convert("RGB"), centre crop, Lanczos, save as PNG, in one process

What `catdata build` does beyond the loop, such as checks, duplicates and shards, is in its numbers. `ratio` is the
speed of the first over that of the loop, the lowest of all sizes of photos. The command takes a second or two to
start, so few photos make it look slow.

examples:
  python benchmarks/build.py
  python benchmarks/build.py --photos 4000 --num 200
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument(
        "--photos",
        type=count,
        nargs="+",
        default=[256, 1632],
        metavar="PX",
        help="widths of the photos, which are 4 to 3 (default: 256 1632, the latter 2 megapixels)",
    )
    parser.add_argument("--size", type=count, default=64, metavar="PX", help="of the pictures (default: %(default)s)")
    parser.add_argument("--num", type=count, default=2000, metavar="N", help="photos to draw (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=positive, default=5, metavar="S", help="length of a turn (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    results = [_measure(width, a.num, a.size, a.seconds, a.repeats) for width in a.photos]
    table(
        ("photo", *(f"{way}/s" for way in results[0]["images_per_second_per_core"]), "ratio"),
        [(r["photo"], *r["images_per_second_per_core"].values(), r["ratio"]) for r in results],
    )
    return {"results": results, "ratio": min(r["ratio"] for r in results), "cores": cores(), "machine": machine()}


def _measure(width: int, num: int, size: int, seconds: float, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        _draw(photos, num, width)
        ways: dict[str, Work] = {
            LOOP: partial(_loop, photos, Path(folder, "png"), size),
            OURS: partial(_command, photos, Path(folder, "shards"), size),
            ONE_PROCESS: partial(_build, photos, Path(folder, "shards"), size),
        }
        found = compare(f"{width} pixels", ways, seconds=seconds, repeats=repeats, settle=0)
    speeds = found["images_per_second"]
    speeds[OURS] = round(speeds[OURS] / cores(), 1)
    return {
        "photo": width,
        "images_per_second_per_core": speeds,
        "ratio": round(1 / found["ratios"][OURS] / cores(), 3),
        "ratio_one_process": round(1 / found["ratios"][ONE_PROCESS], 3),
    }


def _draw(folder: Path, num: int, width: int) -> None:
    """Photos with structure of a twelfth of their side and the grain of a camera."""
    folder.mkdir()
    shape = (width * 3 // 4, width)
    for i in progress(range(num), "draw", "photo", num):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.integers(-12, 13, (*shape, 1), dtype=np.int16)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=90)


def _loop(photos: Path, out: Path, size: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    done = 0
    for path in sorted(photos.iterdir()):
        with Image.open(path) as file:
            image = file.convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        square.save(out / f"{path.stem}.png")
        done += 1
    return done


def _command(photos: Path, out: Path, size: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "trainer.data.cli", "build", str(photos), str(out), "--size", str(size)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    return int(json.loads(done.stdout)["kept"])


def _build(photos: Path, out: Path, size: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return build([photos], out, size=size, processes=0)[1].kept


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
