"""How fast does `catinfer serve` answer, compared with a server that runs PyTorch once per request?

Both servers run the same generator with random weights on the same cores, and send one image per request as PNG, with
the same encoder. Clients on this machine each keep one connection and ask for the next seed as soon as they have an
answer. No seed is asked for twice, so nothing comes from a cache. The servers take turns.

  catinfer   catinfer serve, which computes what waits in batches
  naive      Starlette and uvicorn with one call of the PyTorch generator for each request, in Starlette's threads

  ratio      our requests/s over the naive server's, the lowest of all numbers of clients; above 1 catinfer is faster

The clients need a part of the same cores, which is in both results.

examples:
  python benchmarks/service.py
  python benchmarks/service.py --recipe dcgan-64 --requests 500 --repeats 5
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, count, machine, median_ratio, table
from PIL import Image

from catgan.command import Parser, UserError, run_command
from catgan.machine import cores
from export.generator import export_onnx
from trainer.data.build.progress import progress
from trainer.models import build_generator
from trainer.recipes import resolve

OURS, NAIVE = "catinfer", "naive"
CLIENTS = (1, 16, 64)

# Prints its address, as `catinfer serve` does.
_NAIVE = """\
import socket, sys
import torch, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from infer.files import encode
from infer.grid import to_uint8
from infer.latents import latents
from trainer.models import build_generator
from trainer.recipes import resolve

recipe, weights, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
generator = build_generator(resolve(recipe, None, gpu=False).model)
generator.load_state_dict(torch.load(weights, weights_only=True))
generator.eval()

def image(request):
    with torch.inference_mode():
        z = torch.from_numpy(latents([int(request.query_params["seed"])], generator.z_dim))
        pixels = to_uint8(generator(z).clamp(-1, 1).numpy())
    return Response(encode(pixels[0], ".png"), media_type="image/png")

listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # the protocol as uvicorn gives it
listener.bind(("127.0.0.1", 0))
listener.listen()
print(f"http://127.0.0.1:{listener.getsockname()[1]}/ serves", file=sys.stderr, flush=True)
app = Starlette(routes=[Route("/image", image)])
uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, http="h11")).run([listener])
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/service.py", __doc__)
    add = parser.add_argument
    add("--recipe", default="dcgan-cpu-64", metavar="R", help="as run.py takes it (default: %(default)s)")
    add("--clients", type=count, nargs="+", default=list(CLIENTS), metavar="N", help="at once (default: 1 16 64)")
    add("--requests", type=count, default=200, metavar="N", help="in each turn, at least (default: %(default)s)")
    add("--repeats", type=count, default=1, metavar="N", help="rounds of turns (default: %(default)s)")
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    module = build_generator(resolve(a.recipe, None, gpu=False).model).eval()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        onnx, weights = Path(temporary, "gen.onnx"), Path(temporary, "gen.pt")
        export_onnx(module, onnx, {"recipe": a.recipe})
        torch.save(module.state_dict(), weights)
        catinfer = ["-c", "from infer.cli import entry; entry()", "serve", str(onnx), "--port", "0", "--device", "cpu"]
        ports = {
            OURS: stack.enter_context(_server(catinfer)),
            NAIVE: stack.enter_context(_server(["-c", _NAIVE, a.recipe, str(weights), str(cores())])),
        }
        _check_equal(ports)
        results = _measure(ports, a.clients, a.requests, a.repeats)
    table(
        ("clients", *(f"{way} {what}" for what in ("requests/s", "p50 ms", "p99 ms") for way in ports), "ratio"),
        [
            (r["clients"], *(r[key][way] for key in ("requests_per_second", "p50_ms", "p99_ms") for way in ports),
             r["ratio"])
            for r in results
        ],
    )  # fmt: skip
    lowest = min(r["ratio"] for r in results)
    return {"recipe": a.recipe, "results": results, "ratio": lowest, "machine": machine()}


@contextmanager
def _server(arguments: list[str]) -> Iterator[int]:
    """The port of a server that Python runs with ``arguments`` meanwhile. Raises ``UserError``."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ serves", line)
        if not found:
            raise UserError(f"a server did not start: {line.strip() or 'nothing was printed'}")
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate()


def _check_equal(ports: dict[str, int]) -> None:
    """Both servers generate the same image, up to one grey level."""
    first, second = (
        np.asarray(Image.open(io.BytesIO(asyncio.run(_ask_all(port, 1, iter([7])))[1]))).astype(int)
        for port in ports.values()
    )
    assert np.abs(first - second).max() <= 1


def _measure(ports: dict[str, int], clients: list[int], requests: int, repeats: int) -> list[dict[str, Any]]:
    """Speeds and latencies for each number of clients: medians over the rounds."""
    seeds = itertools.count(1000)
    rates: dict[int, dict[str, list[float]]] = {n: {way: [] for way in ports} for n in clients}
    times: dict[int, dict[str, list[float]]] = {n: {way: [] for way in ports} for n in clients}
    turns = [(n, way) for _ in range(repeats) for n in clients for way in ports]
    for n, way in progress(turns, "service", "turn", len(turns)):
        asyncio.run(_ask_all(ports[way], n, itertools.islice(seeds, n)))  # settle
        wanted = max(requests, n)
        began = time.perf_counter()
        seconds, _ = asyncio.run(_ask_all(ports[way], n, itertools.islice(seeds, wanted)))
        rates[n][way].append(wanted / (time.perf_counter() - began))
        times[n][way] += seconds
    return [
        {
            "clients": n,
            "requests_per_second": {way: round(statistics.median(rates[n][way]), 1) for way in ports},
            "p50_ms": {way: _percentile(times[n][way], 50) for way in ports},
            "p99_ms": {way: _percentile(times[n][way], 99) for way in ports},
            "ratio": round(median_ratio(rates[n][OURS], rates[n][NAIVE]), 3),
            "ratio_p99": round(_percentile(times[n][NAIVE], 99) / _percentile(times[n][OURS], 99), 3),
        }
        for n in clients
    ]


def _percentile(seconds: list[float], percent: float) -> float:
    """In milliseconds."""
    return round(float(np.percentile(seconds, percent)) * 1e3, 1)


async def _ask_all(port: int, clients: int, seeds: Iterator[int]) -> tuple[list[float], bytes]:
    """Ask for the images of ``seeds`` with ``clients`` connections. Returns seconds per request, and the last image.

    Raises:
        UserError: an answer is not an image.
    """
    seconds: list[float] = []
    content = b""

    async def client() -> None:
        nonlocal content
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for seed in seeds:
            began = time.perf_counter()
            writer.write(b"GET /image?seed=%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % seed)
            header = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", header)
            if not header.startswith(b"HTTP/1.1 200 ") or not found:
                raise UserError(f"a server answered {header.splitlines()[0].decode()}")
            content = await reader.readexactly(int(found[1]))
            seconds.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, content


if __name__ == "__main__":
    run_command("service.py", main)
