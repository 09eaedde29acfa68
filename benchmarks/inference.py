"""How fast does catinfer generate images, compared with the same generator in PyTorch?

Measures the generator of a recipe, from latents in NumPy to uint8 pixels in NumPy, in turns on the same cores:

  catinfer   the ONNX file in infer.session.Generator
  eager      the module in PyTorch
  compiled   the module after torch.compile

Then a cold start: seconds from starting a process to a saved grid of 16 images, and the peak memory of the process, for
catinfer and for a script that loads the weights into PyTorch. The weights are random: they do not change the work.

  ratio      our speed over PyTorch's, the lowest of all batch sizes and of the cold start; above 1 catinfer is faster

examples:
  python benchmarks/inference.py
  python benchmarks/inference.py --recipe r3gan-64 --seconds 2 --repeats 3
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, add_turn_options, compare, count, machine, median_ratio, run_timed, table

from catgan.command import Parser, run_command, say
from catgan.machine import cores
from export.generator import export_onnx
from infer.latents import latents
from infer.session import Generator
from trainer.data.build.progress import progress
from trainer.models import build_generator
from trainer.recipes import resolve

BATCHES = (1, 16, 256)
COLD = 16  # images of a cold start
OURS, EAGER, COMPILED = "catinfer", "eager", "compiled"

# The script of the cold start: weights loaded into PyTorch, neither exported nor compiled.
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
    parser = Parser("python benchmarks/inference.py", __doc__)
    add = parser.add_argument
    add("--recipe", default="dcgan-64", metavar="R", help="as run.py takes it (default: %(default)s)")
    add("--batch", type=count, nargs="+", default=list(BATCHES), metavar="N", help="batch sizes (default: 1 16 256)")
    add("--no-compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    add_turn_options(parser, seconds=5)
    a = parser.parse_args(argv)
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    module = build_generator(resolve(a.recipe, None, gpu=False).model).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(module, folder / "gen.onnx", {"recipe": a.recipe})
        torch.save(module.state_dict(), folder / "gen.pt")
        results = [_warm(module, folder / "gen.onnx", batch, a) for batch in a.batch]
        cold = _cold(a.recipe, folder, a.repeats)
    others = [EAGER] if a.no_compile else [EAGER, COMPILED]
    table(
        ("batch", *(f"{way}/s" for way in (OURS, *others)), *(f"ratio to {way}" for way in others)),
        [
            (r["batch"], *(r["images_per_second"][way] for way in (OURS, *others)), *(r["ratios"][w] for w in others))
            for r in results
        ],
    )
    for way in (OURS, EAGER):
        say(f"cold start, {COLD} images: {way} {cold['seconds'][way]} s, peak {cold['peak_mb'][way]} MB")
    lowest = min(*(r["ratio"] for r in results), cold["ratio"])
    return {"recipe": a.recipe, "results": results, "cold": cold, "ratio": lowest, "machine": machine()}


def _warm(module: torch.nn.Module, onnx: Path, batch: int, a: Any) -> dict[str, Any]:
    """The comparison for one batch size. All ways must generate the same images, up to one grey level."""
    ours = Generator(onnx, "cpu")
    z = latents(range(batch), ours.z_dim)

    def pytorch(network: Any) -> np.ndarray:
        with torch.inference_mode():
            images = network(torch.from_numpy(z)).clamp(-1, 1)
            return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    ways: dict[str, Any] = {OURS: lambda: len(ours(z)), EAGER: lambda: len(pytorch(module))}
    networks: list[Any] = [module]
    if not a.no_compile:
        compiled = torch.compile(module, dynamic=False)
        networks.append(compiled)
        ways[COMPILED] = lambda: len(pytorch(compiled))
    for network in networks:
        difference = np.abs(pytorch(network).astype(int) - ours(z)).max()
        assert difference <= 1, difference
    return {"batch": batch} | compare(f"batch {batch}", ways, seconds=a.seconds, repeats=a.repeats, settle=1)


def _cold(recipe: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of a process that saves a grid, in turns, and its peak memory."""
    script = folder / "pytorch.py"
    script.write_text(_PYTORCH, encoding="utf-8")
    catinfer = [sys.executable, "-c", "from infer.cli import entry; entry()", "--device", "cpu"]
    commands = {
        OURS: [*catinfer, "--onnx", str(folder / "gen.onnx"), "--n", str(COLD), "--out", str(folder / "a.png")],
        EAGER: [sys.executable, str(script), recipe, str(folder / "gen.pt"), str(folder / "b.png"), str(cores())],
    }
    seconds: dict[str, list[float]] = {way: [] for way in commands}
    peaks = dict.fromkeys(commands, 0.0)
    for round_ in progress(range(repeats + 1), "cold", "round", repeats + 1):
        for way, command in commands.items():
            took, peak = _child(command)
            if round_:  # the first round fills the file cache
                seconds[way].append(took)
            peaks[way] = max(peaks[way], peak)
    return {
        "seconds": {way: round(statistics.median(values), 3) for way, values in seconds.items()},
        "ratio": round(median_ratio(seconds[EAGER], seconds[OURS]), 3),
        "peak_mb": {way: round(peak, 1) for way, peak in peaks.items()},
    }


def _child(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory (MB) of a process.

    Raises:
        UserError: it failed; with the last line of its stderr.
    """
    # Run by a process of its own: the system reports only the peak of the largest of all children so far.
    watch = (
        "import resource, subprocess, sys, time; t = time.perf_counter();"
        "status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode;"
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    out, *_ = run_timed(["-S", "-c", watch, *command], os.environ | {"PYTHONPATH": str(ROOT)})
    took, peak = map(float, out.split())
    return took, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10) * 1.048576


if __name__ == "__main__":
    run_command("inference.py", main)
