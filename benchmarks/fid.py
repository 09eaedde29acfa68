"""How fast is `catfid`, compared with `python -m pytorch_fid` on the same images, and are the values equal?

Times both commands on the CPU from start to value, with --num real and --num generated images (synthetic PNG, 64x64).
Both read the same weights file: CATGAN_INCEPTION_WEIGHTS, or random weights of InceptionV3's shape. What catfid exports
once per weights file is made before the first turn.

  ratio             wall time of pytorch_fid over that of catfid, the median of the rounds; above 1 catfid is faster
  ratio_cpu         the same of CPU time, all cores together
  equal             whether the values agree to a relative 1e-4
  distance_seconds  one Fréchet distance at 2,048 dimensions: eigen-decompositions as in catfid, SciPy's sqrtm as in
                    pytorch_fid

examples:
  python benchmarks/fid.py
  python benchmarks/fid.py --num 100 --repeats 1      a quick look; mostly start-up and the distance itself
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import count, machine, median_ratio, run_timed, table, textured
from scipy import linalg

from catgan.command import Parser, UserError, run_command
from trainer.data.build.progress import progress
from trainer.features.networks import INCEPTION
from trainer.features.weights import find_inception
from trainer.metrics.frechet import Gaussian, frechet_distance

OURS, THEIRS = WAYS = ("catfid", "pytorch_fid")
_SIZE = 64
_TOLERANCE = 1e-4


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/fid.py", __doc__)
    add = parser.add_argument
    add("--num", type=count, default=2000, metavar="N", help="images per side (default: %(default)s)")
    add("--repeats", type=count, default=3, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.num < 2:
        raise UserError(f"--num {a.num} is given: at least 2 images per side are needed")
    values, wall, cpu = _measure(a.num, a.repeats)
    table(
        ("command", "value", "wall s", "CPU s"),
        [(way, f"{values[way]:.6g}", f"{median(wall[way]):.1f}", f"{median(cpu[way]):.1f}") for way in WAYS],
    )
    difference = abs(values[OURS] / values[THEIRS] - 1)
    return {
        "ratio": round(median_ratio(wall[THEIRS], wall[OURS]), 3),
        "ratio_cpu": round(median_ratio(cpu[THEIRS], cpu[OURS]), 3),
        "values": values,
        "relative_difference": difference,
        "equal": difference <= _TOLERANCE,
        "seconds": {way: median(wall[way]) for way in WAYS},
        "distance_seconds": _distance(2048),
        "machine": machine(),
    }


def _measure(num: int, repeats: int) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]]]:
    """The value of each command, and its wall and CPU seconds in each round."""
    values: dict[str, float] = {}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = _weights(root)
        _make_images(root / "warm", 2, 0)
        for seed, side in enumerate(("real", "fake")):
            _make_images(root / side, num, seed)
        sides = [str(root / "real"), str(root / "fake")]
        environment = os.environ | {"TORCH_HOME": str(root / "torch"), "CATGAN_CACHE": str(root / "cache")}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        catfid = ["-m", "trainer.metrics.catfid.cli", "--weights", str(weights)]
        commands = {
            OURS: [*catfid, *sides, "--metrics", "fid", "--force"],
            THEIRS: ["-m", "pytorch_fid", "--device", "cpu", *sides],
        }
        run_timed([*catfid, str(root / "warm"), "--save-stats", str(root / "warm.npz")], environment)
        turns = [way for _ in range(repeats) for way in WAYS]
        for way in progress(turns, "commands", "turn", len(turns)):
            out, wall_s, cpu_s = run_timed(commands[way], environment)
            wall[way].append(wall_s)
            cpu[way].append(cpu_s)
            values[way] = float(out.split()[-1]) if way == THEIRS else next(iter(json.loads(out)["metrics"].values()))
    return values, wall, cpu


def _weights(root: Path) -> Path:
    """The weights, at the place where pytorch_fid looks before it downloads."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = root / "torch" / "hub" / "checkpoints" / FID_WEIGHTS_URL.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    if os.environ.get("CATGAN_INCEPTION_WEIGHTS"):
        path.symlink_to(find_inception().resolve())
        return path
    torch.manual_seed(0)
    network = INCEPTION.build()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def _make_images(folder: Path, num: int, seed: int) -> None:
    """Write ``num`` PNG files; those of seed 1 have less contrast, so that there is a distance."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(num):
        textured(rng, _SIZE, _SIZE, cells=(8, 8), contrast=256 - 100 * seed).save(folder / f"{i:05d}.png")


def _distance(dim: int) -> dict[str, float]:
    """Seconds of the distance of two Gaussians of full rank: ours without and with the real side's factor cached, and
    the matrix square root that pytorch_fid takes."""
    rng = np.random.default_rng(0)
    sides = [Gaussian(rng.standard_normal(dim), np.cov(rng.standard_normal((dim, 2 * dim))), 2 * dim) for _ in range(2)]
    found = {}
    for name, work in (
        ("eigh", lambda: frechet_distance(*sides)),
        ("eigh, real side known", lambda: frechet_distance(*sides)),  # a Gaussian keeps its factor
        ("sqrtm", lambda: linalg.sqrtm(sides[0].cov @ sides[1].cov)),
    ):
        began = time.perf_counter()
        work()
        found[name] = round(time.perf_counter() - began, 2)
    return found


if __name__ == "__main__":
    run_command("fid.py", main)
