"""``catfid`` against ``python -m pytorch_fid`` on the same pictures and weights, as commands."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import count, machine, median_ratio, table
from PIL import Image
from scipy import linalg

from catgan.command import Parser, UserError, run_command
from trainer.data.build.progress import progress
from trainer.features.networks import INCEPTION
from trainer.features.weights import find_inception
from trainer.metrics.frechet import Gaussian, frechet_distance

NAME = "fid.py"
OURS, THEIRS = "catfid", "pytorch_fid"
_SIZE = 64
_TOLERANCE = 1e-4

_DESCRIPTION = """\
Seconds from the start of the command to its value, of --num real and --num generated pictures (drawn PNG, 64x64), on
the CPU. Both read one weights file: CATGAN_INCEPTION_WEIGHTS, or random weights of InceptionV3's shape. What catfid
exports once for each weights file is made before the first turn. `ratio` is pytorch_fid's wall time over catfid's,
`ratio_cpu` the same of the seconds of all cores; above 1 catfid is faster. The values must agree to a relative 1e-4.

Also: the eigen-decompositions of one Fréchet distance at 2,048 dimensions against SciPy's sqrtm.

examples:
  python benchmarks/fid.py
  python benchmarks/fid.py --num 100 --repeats 1      # a quick look; mostly start-up and the distance itself
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--num", type=count, default=2000, metavar="N", help="pictures a side (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.num < 2:
        raise UserError(f"--num {a.num} is given: at least 2 pictures a side are needed")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = _weights(root)
        _draw(root / "warm", 2, 0)
        for seed, side in enumerate(("real", "fake")):
            _draw(root / side, a.num, seed)
        sides = [str(root / "real"), str(root / "fake")]
        environment = os.environ | {"TORCH_HOME": str(root / "torch"), "CATGAN_CACHE": str(root / "cache")}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        catfid = ["-m", "trainer.metrics.catfid.cli", *sides, "--metrics", "fid", "--force", "--weights", str(weights)]
        ways: dict[str, tuple[list[str], Callable[[str], float]]] = {
            OURS: (catfid, lambda out: next(iter(json.loads(out)["metrics"].values()))),
            THEIRS: (["-m", "pytorch_fid", "--device", "cpu", *sides], lambda out: float(out.split()[-1])),
        }
        _run(
            [
                "-m",
                "trainer.metrics.catfid.cli",
                str(root / "warm"),
                "--save-stats",
                str(root / "warm.npz"),
                *catfid[-2:],
            ],
            environment,
        )
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        values: dict[str, float] = {}
        turns = [name for _ in range(a.repeats) for name in ways]
        for name in progress(turns, "commands", "turn", len(turns)):
            command, read = ways[name]
            out, *took = _run(command, environment)
            seconds[name].append((took[0], took[1]))
            values[name] = read(out)
    wall, cpu = ({name: [turn[i] for turn in took] for name, took in seconds.items()} for i in range(2))
    table(
        ("command", "value", "wall s", "CPU s"),
        [(n, f"{values[n]:.6g}", f"{np.median(wall[n]):.1f}", f"{np.median(cpu[n]):.1f}") for n in ways],
    )
    difference = abs(values[OURS] / values[THEIRS] - 1)
    return {
        "ratio": round(median_ratio(wall[THEIRS], wall[OURS]), 3),
        "ratio_cpu": round(median_ratio(cpu[THEIRS], cpu[OURS]), 3),
        "values": values,
        "relative_difference": difference,
        "equal": difference <= _TOLERANCE,
        "seconds": {name: float(np.median(took)) for name, took in wall.items()},
        "distance_seconds": _distance(2048),
        "machine": machine(),
    }


def _weights(root: Path) -> Path:
    """The weights at the place where pytorch_fid looks before it downloads."""
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


def _draw(folder: Path, num: int, seed: int) -> None:
    """Coloured structure of an eighth of the side, and grain; the second side is of lower contrast."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(num):
        coarse = rng.integers(0, 256 - 100 * seed, (8, 8, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


def _run(arguments: list[str], environment: dict[str, str]) -> tuple[str, float, float]:
    """What a command prints, its wall time, and the CPU time of it and its children, in seconds."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, began = cpu(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(arguments[:2])} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout, time.perf_counter() - began, cpu() - before


def _distance(dim: int) -> dict[str, float]:
    """Seconds of the distance of two Gaussians of full rank: ours from nothing, ours with the real side's factor known,
    and the square root of the product of covariances that pytorch_fid takes."""
    rng = np.random.default_rng(0)
    sides = [Gaussian(rng.standard_normal(dim), np.cov(rng.standard_normal((dim, 2 * dim))), 2 * dim) for _ in range(2)]
    found = {}
    for name, work in (
        ("eigh", lambda: frechet_distance(*sides)),
        ("eigh, real side known", lambda: frechet_distance(*sides)),
        ("sqrtm", lambda: linalg.sqrtm(sides[0].cov @ sides[1].cov)),
    ):
        began = time.perf_counter()
        work()
        found[name] = round(time.perf_counter() - began, 2)
    return found


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
