"""Recipes against the plain DCGAN loop at equal training time: how far from the real pictures does each end?"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Contestant, plain_contestant, recipe_contestant
from measure import Parser, count, device, machine, positive, table, wait_for_device
from torch import Tensor, nn

from infer.command import UserError, run_command, say
from infer.grid import grid
from infer.latents import latents
from trainer.data.drawn import open_data
from trainer.data.shards import Manifest
from trainer.data.stream import eval_images
from trainer.metrics.evaluate import Evaluator
from trainer.metrics.extractors import CHOICES, choose_extractor
from trainer.recipes import DEFAULT_CPU, resolve

NAME = "equal_time.py"
GRID = 64  # pictures in a sample grid

_DESCRIPTION = """\
Trains the plain DCGAN loop of plain_dcgan.py (batch 64) and recipes on the same pictures for the same minutes, one
after the other, and measures the distance of generated to real pictures at equal intervals: of the live weights and
of their average (EMA). The plain loop has no average by itself; it is given that of the recipe dcgan, so that both
columns are there. The clock runs during training only, not during evaluations. All pictures are in memory as uint8
and batches are drawn from it at random, so that the loader has no part in the result.

`ratio` is the distance of the first recipe's average over that of the plain loop's live weights: below 1 is closer to
the real pictures, 0.5 half the distance. OUT gets results.json and sample grids.

examples:
  python benchmarks/equal_time.py                                   the default CPU recipe, drawn cats, 5 minutes
  python benchmarks/equal_time.py --data shards/cats64 --minutes 20
  python benchmarks/equal_time.py --recipes dcgan-cpu,r3gan-cpu --out out/both
"""


def main(argv: list[str]) -> dict[str, Any]:
    a = _parse(argv)
    place = device()
    data_size = Manifest.load(a.data).size if a.data else None
    configs = [resolve(name, data_size, gpu=False) for name in a.recipes.split(",")]
    manifest = open_data(a.data, configs[0].model.size)
    if others := sorted({c.recipe for c in configs if c.model.size != manifest.size}):
        raise UserError(f"{', '.join(others)}: the pictures are {manifest.size}x{manifest.size}; name recipes of that")
    out = _folder(a.out)
    evaluator = Evaluator(choose_extractor(a.extractor), manifest, a.num)
    evaluator.prepare()
    pictures = torch.cat(list(eval_images(manifest, "train")))
    makers = [
        partial(plain_contestant, pictures, place),
        *(partial(recipe_contestant, config, pictures, place) for config in configs),
    ]
    results = []
    for make in makers:
        torch.manual_seed(a.seed)
        results.append(_train(make(), a.minutes, a.intervals, evaluator, out))
    baseline = results[0]["distance_live"]
    for result in results:
        result["ratio"] = round(result["distance"] / baseline, 3)
    columns = ("recipe", "distance", "distance_live", "images_per_second", "kimg", "ratio")
    say(f"\n{evaluator.name} after {a.minutes:g} minutes at {manifest.size}x{manifest.size}")
    table(columns, [[result[column] for column in columns] for result in results])
    record = {
        "metric": evaluator.name,
        "minutes": a.minutes,
        "size": manifest.size,
        "dataset_digest": manifest.digest,
        "results": results,
        "ratio": results[1]["ratio"],
        "machine": machine(),
    }
    temporary = out / ".results.json"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / "results.json")
    return record | {"out": str(out)}


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(NAME, _DESCRIPTION)
    parser.add_argument("--data", metavar="SHARDS", help="folder of shards (default: drawn cats of the recipe's size)")
    parser.add_argument(
        "--recipes", default=DEFAULT_CPU, metavar="A,B", help="families or recipes of run.py (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=positive, default=5, metavar="M", help="training time of each (default: %(default)s)"
    )
    parser.add_argument(
        "--intervals", type=count, default=5, metavar="N", help="evaluations of each (default: %(default)s)"
    )
    parser.add_argument(
        "--num", type=count, default=2048, metavar="N", help="pictures per evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--extractor", choices=CHOICES, default="auto", help="network that judges (default: %(default)s, as run.py)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    parser.add_argument("--out", default="out/equal_time", metavar="OUT", help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def _folder(out: str) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; give another --out") from None
    return Path(out)


def _train(c: Contestant, minutes: float, intervals: int, evaluator: Evaluator, out: Path) -> dict[str, Any]:
    """Train for ``minutes`` by the clock and judge ``intervals`` times on the way, the last time at the end."""
    curve: list[dict[str, float]] = []
    nimg, trained = 0, 0.0
    steps_per_look = 10 if torch.cuda.is_available() else 1  # at the clock, which on a GPU means waiting for it
    for i in range(1, intervals + 1):
        until = minutes * 60 * i / intervals
        while trained < until:
            began = time.perf_counter()
            for _ in range(steps_per_look):
                c.step(nimg)
                nimg += c.batch
            wait_for_device()
            trained += time.perf_counter() - began
        point = {
            "minutes": round(trained / 60, 2),
            "kimg": round(nimg / 1000, 2),
            "distance": round(evaluator(partial(_generate, c.average, c.z_dim))["value"], 2),
            "distance_live": round(evaluator(partial(_generate, c.live, c.z_dim))["value"], 2),
        }
        say(
            f"{c.name}: {point['minutes']:.2f} of {minutes:g} minutes, {point['kimg']:g} kimg,"
            f" distance {point['distance']:g}, live {point['distance_live']:g}"
        )
        sheet = _generate(c.average, c.z_dim, range(GRID)).permute(0, 2, 3, 1).cpu().numpy()
        grid(np.ascontiguousarray(sheet)).save(out / f"{c.name}-{i:02d}.png")
        curve.append(point)
    final = curve[-1]
    return {
        "recipe": c.name,
        "distance": final["distance"],
        "distance_live": final["distance_live"],
        "images_per_second": round(nimg / trained, 1),
        "kimg": final["kimg"],
        "curve": curve,
    }


@torch.no_grad()
def _generate(module: nn.Module, z_dim: int, seeds: Sequence[int]) -> Tensor:
    """Pictures uint8 ``[n, 3, size, size]`` with batch norm's running statistics, as a shipped generator has them."""
    training = module.training
    module.eval()
    z = torch.from_numpy(latents(seeds, z_dim)).to(next(module.parameters()).device)
    pictures = ((module(z).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    module.train(training)
    return pictures


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
