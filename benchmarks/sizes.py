"""What does a training image of each system cost at 256x256, compared with 128x128?

Trains each recipe as it is, at full resolution, for one step of a few images on the CPU, each time in a process of its
own. The recipe's batch would need the memory of a GPU, so the peak is measured at two small batches; its growth per
image is what a larger batch adds. Linux only.

  ratio     CPU seconds per training image at the largest size over those at the smallest, the highest of all recipes
  memory    peak of the process above what it took before, in MiB: of a step, what a further image adds to it, and of
            generating as many images as an evaluation generates in one pass

examples:
  python benchmarks/sizes.py
  python benchmarks/sizes.py --recipes fastgan --sizes 128 512
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import count, machine, table

from catgan.command import Parser, UserError, run_command, say
from trainer.config import ProjectedConfig
from trainer.models import full_resolution_kimg
from trainer.recipes import FAMILIES, SIZES, resolve
from trainer.sample import generate
from trainer.step import GAN

RECIPES = ("r3gan", "stylegan2", "progan", "fastgan")


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/sizes.py", __doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=FAMILIES, default=list(RECIPES), metavar="NAME", help="default: %(default)s")
    add("--sizes", nargs="+", type=int, choices=SIZES, default=[128, 256], help="sides in pixels; default: 128 256")
    add("--batch", type=count, default=1, metavar="N", help="smaller batch; the other one is twice it (default: 1)")
    a = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        raise UserError("peak memory is read from /proc, which only Linux has")
    results = []
    for family in a.recipes:
        for size in sorted(a.sizes):
            results.append({"recipe": f"{family}-{size}", "size": size, **_measure(f"{family}-{size}", a.batch)})
            say(f"{results[-1]}")
    table(("recipe", *list(results[0])[2:]), [[v for k, v in row.items() if k != "size"] for row in results])
    first, last = min(a.sizes), max(a.sizes)
    seconds = {row["recipe"]: row["cpu_seconds_per_image"] for row in results}
    ratios = {family: round(seconds[f"{family}-{last}"] / seconds[f"{family}-{first}"], 2) for family in a.recipes}
    return {"machine": machine(), "results": results, "ratios": ratios, "ratio": max(ratios.values())}


def _measure(recipe: str, batch: int) -> dict[str, float]:
    """The measurements of one recipe, from three processes."""
    small, large, sampled = (_in_process(recipe, n) for n in (batch, 2 * batch, 0))
    return {
        "batch": 2 * batch,
        "cpu_seconds_per_image": round(large["cpu_seconds"] / (2 * batch), 3),
        "step_mib": round(large["mib"]),
        "mib_per_image": round((large["mib"] - small["mib"]) / batch),
        "evaluation_mib": round(sampled["mib"]),
    }


def _in_process(recipe: str, batch: int) -> dict[str, float]:
    command = [sys.executable, "-c", f"import sizes; sizes.print_work({recipe!r}, {batch})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_work(recipe: str, batch: int) -> None:
    """Print what a step of a batch, or with a batch of 0 generating images, takes in this process."""
    print(json.dumps(work(recipe, batch)))


def work(recipe: str, batch: int) -> dict[str, float]:
    """CPU seconds of one step, with all penalties, and the peak memory in MiB, networks and optimisers included. With a
    batch of 0, of generating images instead."""
    config = replace(resolve(recipe, None, gpu=True), projected=ProjectedConfig(), batch=max(batch, 1))
    torch.manual_seed(0)
    before = _status("VmRSS")
    gan = GAN(config, torch.device("cpu"))
    nimg, size = round(full_resolution_kimg(config) * 1000), config.model.size
    gan.schedule(nimg)
    began = time.process_time()
    if batch:
        reals = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
        gan.step(reals, nimg, reals.flip(3) if gan.fresh_reals else None)
        gan.ema.update(gan.generator, batch, nimg + batch)
    else:
        generate(gan, range(gan.most_per_pass))
    return {"cpu_seconds": time.process_time() - began, "mib": _status("VmHWM") - before}


def _status(name: str) -> float:
    """A value of this process in MiB: VmRSS is its memory now, VmHWM the peak."""
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(kib) / 1024


if __name__ == "__main__":
    run_command("sizes.py", main)
