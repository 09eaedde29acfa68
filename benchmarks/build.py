"""How fast is `catdata build`, compared with a plain Pillow loop over the same photos?

Images per second and core of building a data set of --size from synthetic JPEG photos:

  catdata build             the command from start to end, with all cores; divided by their number
  catdata build, 1 process  the same work in a running process, without helper processes
  Pillow loop               open, convert("RGB"), centre crop, Lanczos, save as PNG, in one process

  ratio              speed per core of the command over that of the loop, the lowest of all sizes of photos
  ratio_one_process  the same for the running process

`catdata build` also checks images, looks for duplicates and writes shards; the loop does not. The command takes a
second or two to start, so few photos make it look slow.

examples:
  python benchmarks/build.py
  python benchmarks/build.py --photos 4000 --num 200
"""

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
from measure import ROOT, Work, add_turn_options, compare, count, machine, table, textured
from PIL import Image

from catgan.command import Parser, run_command
from catgan.machine import cores
from trainer.data.build.build import build
from trainer.data.build.progress import progress

OURS, ONE_PROCESS, LOOP = "catdata build", "catdata build, 1 process", "Pillow loop"


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/build.py", __doc__)
    add = parser.add_argument
    widths = "widths of the photos, which are 4 to 3 (default: 256 1632, the latter 2 megapixels)"
    add("--photos", type=count, nargs="+", default=[256, 1632], metavar="PX", help=widths)
    add("--size", type=count, default=64, metavar="PX", help="of the images built (default: %(default)s)")
    add("--num", type=count, default=2000, metavar="N", help="number of photos (default: %(default)s)")
    add_turn_options(parser, seconds=5)
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
        photos.mkdir()
        for i in progress(range(num), "photos", "photo", num):
            photo = textured(np.random.default_rng(i), width, width * 3 // 4, cells=(16, 12), contrast=256)
            photo.save(photos / f"{i:06d}.jpg", quality=90)
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
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return int(json.loads(done.stdout)["kept"])


def _build(photos: Path, out: Path, size: int) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return build([photos], out, size=size, processes=0)[1].kept


if __name__ == "__main__":
    run_command("build.py", main)
