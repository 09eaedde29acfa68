"""catinfer against the same generator in PyTorch: speed by batch, cold start, memory, and what is installed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import compare, count, machine, median_ratio, positive, table

from catgan.command import Parser, UserError, run_command, say
from export.generator import export_onnx
from infer.latents import latents
from infer.session import Generator
from trainer.data.build.progress import progress
from trainer.models import build_generator
from trainer.recipes import resolve

NAME = "inference.py"
BATCHES = (1, 16, 256)
COLD = 16  # pictures of a cold start
ROOT = Path(__file__).parents[1]
OURS, EAGER, COMPILED = "catinfer", "eager", "compiled"

_DESCRIPTION = """\
Pictures per second of the generator of a recipe, from latents in NumPy to uint8 pixels in NumPy: the ONNX file in
infer.session.Generator, the module in PyTorch as it is, and the module after torch.compile, in turns on the same
cores. Then the seconds from starting a process to a sheet of 16 pictures and the process's peak memory: catinfer, and
a script that loads the weights into PyTorch. The weights are random: they do not change the work. `ratio` is our speed
over PyTorch's, the lowest of all batches and of the cold starts.

With --install it also makes a clean environment, installs catgan[infer] with pip, and says how large it becomes, what
is in it, and how long the imports take there.

examples:
  python benchmarks/inference.py
  python benchmarks/inference.py --recipe r3gan-64 --seconds 2 --repeats 3
  python benchmarks/inference.py --install                   needs pip's index
"""

# What someone would write who has the weights and PyTorch: no export, no compilation.
_PYTORCH = """\
import sys
import numpy as np
import torch
from PIL import Image
from infer.grid import grid, to_uint8
from infer.latents import latents
from trainer.models import build_generator
from trainer.recipes import resolve

recipe, weights, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
generator = build_generator(resolve(recipe, None, gpu=False).model)
generator.load_state_dict(torch.load(weights, weights_only=True))
generator.eval()
with torch.inference_mode():
    images = generator(torch.from_numpy(latents(range(16), generator.z_dim))).clamp(-1, 1).numpy()
grid(to_uint8(images)).save(out)
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("--recipe", default="dcgan-64", metavar="R", help="a recipe's name (default: %(default)s)")
    parser.add_argument(
        "--batch", type=count, nargs="+", default=list(BATCHES), metavar="N", help="batches (default: 1 16 256)"
    )
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds of turns (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile away; it needs a C++ compiler")
    parser.add_argument("--install", action="store_true", help="measure a clean installation as well")
    a = parser.parse_args(argv)
    torch.set_num_threads(_cores())
    torch.manual_seed(0)
    module = build_generator(resolve(a.recipe, None, gpu=False).model).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(module, folder / "gen.onnx", {"recipe": a.recipe})
        torch.save(module.state_dict(), folder / "gen.pt")
        results = [_warm(module, folder / "gen.onnx", batch, a) for batch in a.batch]
        cold = _cold(a.recipe, folder, a.repeats)
        install = _install(folder) if a.install else None
    others = [EAGER] if a.no_compile else [EAGER, COMPILED]
    table(
        ("batch", *(f"{way}/s" for way in (OURS, *others)), *(f"ratio to {way}" for way in others)),
        [
            (r["batch"], *(r["images_per_second"][way] for way in (OURS, *others)), *(r["ratios"][w] for w in others))
            for r in results
        ],
    )
    for way in (OURS, EAGER):
        say(f"cold, {COLD} pictures: {way} {cold['seconds'][way]} s, peak {cold['peak_mb'][way]} MB")
    lowest = min(*(r["ratio"] for r in results), cold["ratio"])
    result = {"recipe": a.recipe, "results": results, "cold": cold, "ratio": lowest, "machine": machine()}
    return result | ({"install": install} if install else {})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warm(module: torch.nn.Module, onnx: Path, batch: int, a: Any) -> dict[str, Any]:
    """The comparison for one batch; the ways must draw the same pictures."""
    ours = Generator(onnx, "cpu")
    z = latents(range(batch), ours.z_dim)

    def pytorch(network: Any) -> np.ndarray:
        with torch.inference_mode():
            images = network(torch.from_numpy(z)).clamp(-1, 1)
            return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    ways: dict[str, Any] = {OURS: lambda: len(ours(z)), EAGER: lambda: len(pytorch(module))}
    networks = [module]
    if not a.no_compile:
        compiled = torch.compile(module, dynamic=False)
        networks.append(compiled)
        ways[COMPILED] = lambda: len(pytorch(compiled))
    for network in networks:
        difference = np.abs(pytorch(network).astype(int) - ours(z)).max()
        assert difference <= 1, difference
    return {"batch": batch} | compare(f"batch {batch}", ways, seconds=a.seconds, repeats=a.repeats, settle=1)


def _cold(recipe: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds from starting a process to its end with a sheet written, in turns, and its peak memory."""
    script = folder / "pytorch.py"
    script.write_text(_PYTORCH, encoding="utf-8")
    catinfer = [sys.executable, "-c", "from infer.cli import entry; entry()", "--device", "cpu"]
    commands = {
        OURS: [*catinfer, "--onnx", str(folder / "gen.onnx"), "--n", str(COLD), "--out", str(folder / "a.png")],
        EAGER: [sys.executable, str(script), recipe, str(folder / "gen.pt"), str(folder / "b.png"), str(_cores())],
    }
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    peaks = dict.fromkeys(commands, 0.0)
    for round_ in progress(range(repeats + 1), "cold", "round", repeats + 1):
        for way, command in commands.items():
            took, peak = _child(command)
            if round_:  # the first one fills the file cache
                seconds[way].append(took)
            peaks[way] = max(peaks[way], peak)
    return {
        "seconds": {way: round(statistics.median(values), 3) for way, values in seconds.items()},
        "ratio": round(median_ratio(seconds[EAGER], seconds[OURS]), 3),
        "peak_mb": {way: round(peak, 1) for way, peak in peaks.items()},
    }


def _child(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MB, all that was resident) of a process that must end well."""
    # A process between, since a process is told the peak of the largest of all its children only.
    watch = (
        "import resource, subprocess, sys, time; t = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", watch, *command], check=True, capture_output=True, text=True, env=env
    )
    took, peak = map(float, done.stdout.split())
    return took, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10) * 1.048576


def _install(folder: Path) -> dict[str, Any]:
    """Size (MB), distributions and import seconds of ``catgan[infer]`` in an environment of its own."""
    say("installing catgan[infer] into a clean environment")
    place = folder / "clean"
    venv.create(place, with_pip=True)
    python = str(place / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    listing = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(listing, check=True, capture_output=True, text=True).stdout.strip())
    before = _names(packages)
    command = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[infer]"]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UserError("pip could not install catgan[infer]: see its message above, or leave --install away")
    added = _names(packages) - before
    files = [p for p in packages.rglob("*") if p.is_file() and p.relative_to(packages).parts[0] not in before]
    times = []
    for _ in range(6):
        began = time.perf_counter()
        subprocess.run([python, "-c", "import infer.generate, onnxruntime"], cwd=folder, check=True)
        imports = time.perf_counter() - began
        began = time.perf_counter()
        subprocess.run([python, "-c", "pass"], cwd=folder, check=True)
        times.append(imports - (time.perf_counter() - began))
    return {
        "mb": round(sum(p.stat().st_size for p in files) / 1e6, 1),
        "distributions": sorted(n.removesuffix(".dist-info") for n in added if n.endswith(".dist-info")),
        "import_seconds": round(statistics.median(times[1:]), 3),
    }


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
