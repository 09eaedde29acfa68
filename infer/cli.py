"""``catinfer``: images from a generator in an ONNX file.

Parses the arguments. NumPy, Pillow and onnxruntime are imported only after that, so ``--help`` and mistakes are
answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catgan.command import STDOUT, Parser, UserError, number, run_command
from catgan.location import local_path, resolved_path
from infer.values import DEFAULT_N, DEVICES, MAX_DIRECTION, MAX_N, MAX_PSI, MAX_SEED, RUNS, parse_seeds

NAME = "catinfer"
SWEEP = "0.4,0.6,0.8,1,1.2"

_DESCRIPTION = """\
Generate images with a trained generator: the gen.onnx of a training run (or of catexport), or the built-in one. Needs
NumPy, Pillow and onnxruntime; no PyTorch and no network, except for --list with an MLflow server.
"""
_EPILOG = """\
An image depends on its seed alone: image i of --seed s is image 0 of --seed s+i, for any --n.

examples:
  catinfer                                               16 cats of the built-in generator as one sheet, cats.png
  catinfer --list                                        the built-in generators, and those of the runs in out/runs
  catinfer --list http://127.0.0.1:5000                  the built-in generators, and those in MLflow's registry
  catinfer --onnx gen.onnx                               16 images as one sheet, cats.png
  catinfer --onnx gen.onnx --n 64 --seed 1000 --psi 0.7  other, more typical cats
  catinfer --onnx gen.onnx --seeds 3,7-12 --labels       chosen cats with their seeds below
  catinfer --onnx gen.onnx --n 5000 --out fakes/         fakes/cat-000000.png to fakes/cat-004999.png
  catinfer --onnx gen.onnx --n 100000 --out fakes/ --shards  a WebDataset; after a stop, the same command continues
  catinfer --onnx gen.onnx --n 8 --interpolate walk.gif  from cat 0 to cat 1 ... to cat 7 and back to cat 0
  catinfer --onnx gen.onnx --n 8 --truncation-sweep      a row of the same 8 cats for each psi
  catinfer --onnx gen.onnx --n 1 --out - > cat.png       to standard output
  catinfer --onnx gen.onnx --direction 1=2 --direction 3=-1  the same cats, moved along directions in the latent space
  catinfer --onnx gen.onnx --class tabby,black --n 8     two rows, the same 8 seeds in each class
  catinfer --onnx gen.onnx --latent mine.latent.npz --latent yours.latent.npz --interpolate walk.gif

other commands:
  catinfer inspect FILE...  where an image comes from, and the command that makes it again
  catinfer doctor       which devices onnxruntime can use here, what is wrong with CUDA, and how to repair it
  catinfer serve MODEL  images over HTTP, on this machine only unless --host is given
  catinfer serve DIR    the same, and the page of `catexport --web DIR`

Progress goes to stderr, one line of JSON to stdout (with --out - to stderr): out, n, provider, seconds. --debug shows
tracebacks.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(NAME, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--onnx",
        type=_model,
        metavar="FILE",
        help="the generator: one ONNX file below 2 GiB, the folder of a training run, which stands for its best one, "
        "or the name of a built-in one (default drawn-cats-64, which is built in)",
    )
    parser.add_argument(
        "--list",
        type=_place,
        nargs="?",
        const=RUNS,
        metavar="RUNS|URL",
        help=f"write no images, but list the built-in generators, the best ones of the runs in a folder (default "
        f"{RUNS}), and those in the model registry of the MLflow server in MLFLOW_TRACKING_URI, or of the one at URL",
    )
    parser.add_argument("--n", type=number(int, 1, MAX_N), metavar="N", help=f"number of images (default {DEFAULT_N})")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), metavar="S", help="seed of image 0 (default 0)")
    parser.add_argument(
        "--seeds", type=parse_seeds, metavar="LIST", help="these seeds instead of --n and --seed, such as 3,7-12"
    )
    parser.add_argument(
        "--latent",
        type=_path,
        action="append",
        metavar="FILE.npz",
        help="a latent that `cattrain project` found for a photo, instead of a seed; repeat it for several",
    )
    parser.add_argument(
        "--direction",
        type=_parse_direction,
        action="append",
        metavar="K=X",
        help="move all latents by X standard deviations along direction K, counted from 1, that the file has; -10 to "
        "10; directions.png beside the file shows what each one changes; repeat it for several",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="of a generator with classes: the class of the images, by name or number from 0 on; several as a,b or "
        "all: a sheet has a row of the same seeds for each; in single files, arrays and shards the classes take turns "
        "with the seeds (default all)",
    )
    psi = parser.add_mutually_exclusive_group()
    psi.add_argument(
        "--psi",
        type=number(float, 0, MAX_PSI),
        default=1.0,
        metavar="P",
        help="truncation: below 1 cats are more typical and alike, above 1 more unusual; 0 to 2 (default 1). Scales "
        "the latents, or w if the generator has a mapping network",
    )
    psi.add_argument(
        "--truncation-sweep",
        type=_parse_psis,
        nargs="?",
        const=_parse_psis(SWEEP),
        metavar="P,P...",
        help=f"a sheet with a row of the same seeds for each psi (default {SWEEP})",
    )
    parser.add_argument(
        "--out",
        type=_path,
        metavar="FILE|DIR|-",
        help="a name with .png, .jpg, .jpeg or .webp: one sheet of all images; with .npy: one array, uint8 [n, size, "
        "size, 3]; a directory, made if missing: single files named by seed, such as cat-000000.png; -: one sheet, "
        "or with --format npy one array, to standard output (default cats.png; none if only --interpolate is given)",
    )
    parser.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "npy"),
        help="of single files, and with --out -; WebP is lossless (default png)",
    )
    parser.add_argument(
        "--shards",
        action="store_true",
        help="--out DIR/ becomes a WebDataset of PNG for catfid and catdata verify, 1,000 images per shard",
    )
    parser.add_argument("--labels", action="store_true", help="write each image's seed below it on the sheet")
    parser.add_argument(
        "--interpolate",
        type=_path,
        metavar="FILE",
        help="an endless .gif or .webp, or an .mp4, that walks through the latents of the seeds, 20 frames (one "
        "second) from each to the next, on great circles (slerp); add --out for the images themselves",
    )
    _add_device(parser)
    parser.add_argument(
        "--no-metadata",
        dest="metadata",
        action="store_false",
        help="write files that do not say that they are generated, by which generator and from which seeds; by default "
        "they say so as XMP, which `catinfer inspect FILE` reads",
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="write no images, but measure images per second on this machine, for 1, 16 and 256 at once",
    )
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto: CUDA if onnxruntime can use it, else the CPU; cuda: an error if it cannot (default auto)",
    )


def _path(text: str) -> str:
    """A path option, see ``local_path``, or ``-``. A final slash stays, since it means a folder."""
    if text in ("", STDOUT):
        return text
    return str(local_path(text)) + ("/" if text.endswith(("/", os.sep)) else "")


def _place(text: str) -> str:
    """A path option, or the address of an MLflow server."""
    from infer.builtin import is_web_address

    if not is_web_address(text):
        return _path(text)
    if "@" in text:
        raise UserError(
            "--list: give an address without user and password; these are read from MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return text


def _model(text: str) -> str:
    """A path option whose value is a generator, the folder of a training run, or the name of a built-in one."""
    if text.startswith("models:/"):
        raise UserError(f"{text} is in MLflow: `{NAME} --list` shows how to download its file")
    path = _path(text)
    if path and Path(path).is_dir():
        return str(Path(path, "best", "gen.onnx"))
    return _builtin(path)


def _builtin(path: str) -> str:
    """``path``, or if there is no such file and it is the name of a built-in generator, the path of that."""
    from infer.builtin import builtin_models

    return path if Path(path).exists() else str(builtin_models().get(path, path))


def _parse_direction(text: str) -> tuple[int, float]:
    """An argument type: the number of a direction, and a multiple of it."""
    match = re.fullmatch(r"\s*([1-9]\d{0,2})\s*=(.*)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed are a direction and a number, such as 1=2.5")
    return int(match[1]), number(float, -MAX_DIRECTION, MAX_DIRECTION)(match[2])


def _parse_psis(text: str) -> Sequence[float]:
    return [number(float, 0, MAX_PSI)(part) for part in text.split(",")]


def main(argv: list[str]) -> dict[str, Any]:
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]](argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.list is not None:
        if given != {"list"}:
            raise UserError("--list writes no images: omit the other options")

        from infer.builtin import list_models

        return list_models(args.list)
    if args.onnx is None:
        from infer.builtin import DEFAULT

        args.onnx = _model(DEFAULT)
    if args.seeds is not None and (args.n is not None or args.seed is not None):
        raise UserError("--seeds gives the seeds and their number: omit --n and --seed")
    if args.latent is not None and not (args.seeds is args.n is args.seed is None):
        raise UserError("--latent gives latents instead of seeds: omit --n, --seed and --seeds")
    directions = dict(args.direction or ())
    if len(directions) < len(args.direction or ()):
        raise UserError("--direction names a direction twice; give each once")
    if args.benchmark:
        if given - {"benchmark", "onnx", "device"}:
            raise UserError("--benchmark writes no images: omit all options but --onnx and --device")

        from infer.benchmark import benchmark

        return benchmark(args.onnx, args.device)
    first = args.seed or 0
    seeds = args.seeds or range(first, first + (args.n or DEFAULT_N))
    out, walk = args.out, args.interpolate
    if out not in (None, STDOUT) and walk is not None and resolved_path(out) == resolved_path(walk):
        raise UserError(f"--out and --interpolate are both {args.out}: give each a file of its own")
    out = "cats.png" if out is None and walk is None else out
    suffix = f".{args.format}" if args.format else None

    from infer.generate import Order, generate
    from infer.output import parse_output

    output = parse_output(out, suffix, args.shards, args.labels, args.truncation_sweep or ())
    return generate(
        Order(
            args.onnx,
            seeds,
            args.psi,
            output,
            walk,
            args.device,
            args.metadata,
            args.latent or (),
            directions,
            args.classes or (),
        )
    )


def _doctor(argv: list[str]) -> dict[str, Any]:
    parser = Parser(
        f"{NAME} doctor",
        "Report which devices onnxruntime can use on this machine, what is wrong with CUDA, and how to repair it. Exit "
        "status 0 if\nthe CPU works; with --device cuda only if CUDA works.",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="what must work (default auto: the CPU)")
    args = parser.parse_args(argv)

    from infer.doctor import doctor

    return doctor(args.device)


_SERVE = """\
Serve images of a generator over HTTP, for programs and browsers on this machine. The model is loaded once; what waits
is computed in batches; an image has the same bytes as catinfer's file for the same seed and psi.
"""
_SERVE_EPILOG = """\
examples:
  catinfer serve                                  the built-in generator, http://127.0.0.1:8000
  catinfer serve gen.onnx                         another one
  catinfer serve out/runs/mine --port 0           the best generator of a run, on any free port
  catinfer serve page/                            the page of `catexport --web page/`, and its generator as below
  catinfer serve gen.onnx --host 0.0.0.0          for other machines: there is no authentication

  curl -o cat.png  'http://127.0.0.1:8000/image?seed=7&psi=0.8'
  curl -o cats.jpg 'http://127.0.0.1:8000/grid?seeds=3,7-12&format=jpg'
  curl -o walk.gif 'http://127.0.0.1:8000/walk?seeds=1,2,3'
  curl http://127.0.0.1:8000/info                 the model, versions, limits
  curl http://127.0.0.1:8000/metrics              for Prometheus; /healthz for probes
  curl http://127.0.0.1:8000/openapi.json         all paths and parameters

SIGTERM and Ctrl-C let running requests end for some seconds; then the exit status is 0.
"""


def _serve(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} serve", _SERVE, _SERVE_EPILOG)
    parser.add_argument(
        "target",
        type=_path,
        nargs="?",
        metavar="MODEL|DIR",
        help="a generator's file or the name of a built-in one (default drawn-cats-64), the folder of a training run, "
        "or a folder with index.html",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="A", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, metavar="P", help="0 for any free one (default 8000)"
    )
    _add_device(parser)
    args = parser.parse_args(argv)

    try:
        from infer.service.server import serve
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"serve needs the package {package}: pip install 'catgan[serve]'") from error

    from infer.builtin import DEFAULT

    return serve(_builtin(args.target or DEFAULT), args.host, args.port, args.device)


def _inspect(argv: list[str]) -> dict[str, Any]:
    parser = Parser(
        f"{NAME} inspect",
        "Print as JSON what files say about their origin, and on stderr the command that makes the same image again. "
        "Reads PNG,\nJPEG, WebP, GIF and MP4 from any program, and generators (gen.onnx). Exit status 0 also if a file "
        "says nothing, with\nnull for what is unknown; 2 if it is damaged or of another format.",
    )
    parser.add_argument(
        "files", type=_path, nargs="+", metavar="FILE", help="with the gen.onnx among them, the command names its path"
    )
    args = parser.parse_args(argv)

    from infer.origin import inspect

    return inspect(args.files)


_COMMANDS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "doctor": _doctor,
    "inspect": _inspect,
    "serve": _serve,
}


def entry() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no half-written file stays
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
