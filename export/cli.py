"""``catexport``: a trained generator as one ONNX file.

PyTorch is imported once the arguments are known to be right, so ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from infer.command import Parser, UserError, run_command, say

NAME = "catexport"

_DESCRIPTION = """\
Write a trained generator as one ONNX file for catinfer, and check that onnxruntime draws the same pictures with it as
PyTorch does. Training exports its best generator by itself (RUN/best/gen.onnx); this is for any other.
"""
_EPILOG = """\
examples:
  catexport out/runs/mine                                    the run's best generator, to gen.onnx
  catexport out/runs/mine/checkpoint_000000512000 -o 512.onnx  the averaged generator of one checkpoint
  catexport gen.safetensors -o cats.onnx                     released weights
  catexport gen.onnx --web page                              a page that draws its pictures in the browser

Progress goes to stderr, one line of JSON to stdout: onnx, precision, max_abs_diff. --debug shows tracebacks.
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(NAME, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "source",
        metavar="CHECKPOINT_OR_RUN",
        type=Path,
        help="a run's folder, its best/ folder, a gen.safetensors or a checkpoint folder",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("gen.onnx"),
        help="the file to write, replaced if it exists (default gen.onnx)",
    )
    parser.add_argument(
        "--precision", metavar="P", default="fp32", help="of the weights: fp32, the only one so far (default)"
    )
    parser.add_argument(
        "--web",
        metavar="DIR",
        type=Path,
        help="also write a web page that draws pictures in the browser; here the source may be a gen.onnx too",
    )
    return parser


def main(argv: list[str]) -> dict[str, Any]:
    """Export; returns the JSON object for stdout."""
    args = _parser().parse_args(argv)
    if args.precision in ("fp16", "int8"):
        raise UserError(f"--precision {args.precision} is not there yet; use fp32, the default")
    if args.precision != "fp32":
        raise UserError(f"--precision {args.precision}: give fp32, the default")
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist; give a run's folder, a checkpoint folder or a gen.safetensors")
    if args.out.is_dir():
        raise UserError(f"-o {args.out} is a folder; name the file, such as {args.out / 'gen.onnx'}")

    if args.web is not None:
        from export.page import check_folder, write_page

        check_folder(args.web)
        if args.source.suffix == ".onnx":
            write_page(args.source, args.web)
            return {"web": str(args.web)}

    from trainer.checkpoint import load_generator

    generator, info = load_generator(args.source)
    from export.generator import export_onnx, metadata

    say(f"exporting {info['recipe']} at {info['kimg']:g} kimg")
    difference = export_onnx(generator, args.out, metadata(info))
    say(f"{args.out}: differs from PyTorch by {difference:.1e} at most")
    result = {"onnx": str(args.out), "precision": "fp32", "max_abs_diff": difference}
    if args.web is not None:
        write_page(args.out, args.web)
        result["web"] = str(args.web)
    return result


def entry() -> None:
    run_command(NAME, main)
