"""``catinfer``: pictures from a generator in an ONNX file.

Only the arguments are handled here; NumPy, Pillow and onnxruntime are imported once they are known to be right, so
``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from infer.command import Parser, number, run_command

NAME = "catinfer"
MAX_N = 1_000_000
MAX_SEED = 2**32 - 1
MAX_PSI = 2.0

_DESCRIPTION = """\
Make pictures with a trained generator. Needs the gen.onnx of a training run (or of catexport), NumPy, Pillow and
onnxruntime; no PyTorch.
"""
_EPILOG = """\
A picture belongs to its seed: picture i of --seed s is picture 0 of --seed s+i, whatever --n is.

examples:
  catinfer --onnx gen.onnx                               16 pictures as one sheet, cats.png
  catinfer --onnx gen.onnx --n 64 --seed 1000 --psi 0.7  other, more typical cats
  catinfer --onnx gen.onnx --n 5000 --out fakes/         fakes/cat-000000.png to fakes/cat-004999.png
  catinfer --onnx gen.onnx --n 8 --interpolate walk.gif  from cat 0 to cat 1 ... to cat 7 and back to cat 0

Progress goes to stderr, one line of JSON to stdout: out, n, provider, seconds. --debug shows tracebacks.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(NAME, _DESCRIPTION, _EPILOG)
    parser.add_argument("--onnx", required=True, metavar="FILE", help="the generator, one ONNX file below 2 GiB")
    parser.add_argument(
        "--n", type=number(int, 1, MAX_N), default=16, metavar="N", help="how many pictures (default 16)"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, MAX_SEED), default=0, metavar="S", help="seed of picture 0 (default 0)"
    )
    parser.add_argument(
        "--psi",
        type=number(float, 0, MAX_PSI),
        default=1.0,
        metavar="P",
        help="scales the latents: below 1 the cats are more typical and more alike, above 1 odder; 0 to 2 (default 1)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE|DIR",
        help="a name with .png, .jpg, .jpeg or .webp: one sheet of all pictures; a directory: single files named by "
        "seed, such as cat-000000.png; made where missing (default cats.png; nothing if only --interpolate is given)",
    )
    parser.add_argument(
        "--interpolate",
        metavar="GIF",
        help="an endless GIF that walks through the latents of the N seeds, 20 frames (one second) from each to the "
        "next, on great circles (slerp); give --out as well for the N pictures themselves",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: CUDA where onnxruntime can use it, else the CPU; cuda: an error where it cannot (default auto)",
    )
    return parser


def main(argv: list[str]) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    out = args.out
    if out is None and args.interpolate is None:
        out = "cats.png"

    from infer.generate import generate

    return generate(args.onnx, args.n, args.seed, args.psi, out, args.interpolate, args.device)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
