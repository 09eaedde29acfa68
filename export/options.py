"""The command line of ``catexport``, and what can be checked before the generator is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from catgan.command import Parser, UserError
from catgan.location import local_path
from export.source import is_in_bucket, is_in_mlflow

NAME = "catexport"
PRECISIONS = ("fp32", "fp16", "int8")

_DESCRIPTION = """\
Write a trained generator as one ONNX file for catinfer, and check that onnxruntime generates the same images with it as
PyTorch. Training exports its best generator itself (RUN/best/gen.onnx); catexport is for all others, and for smaller
files:

  fp32  as trained
  fp16  half the size; fast on GPUs, slower than fp32 on CPUs
  int8  a quarter of the size; weights and activations in 8 bits, with scales calibrated on 128 images

If the training data are available, each file is evaluated by the metric of its training. Files that are more than 5%
worse than fp32 are not written without --force.
"""
_EPILOG = """\
examples:
  catexport out/runs/mine                                      the run's best generator, to gen.onnx
  catexport out/runs/mine/checkpoint_000000512000 -o 512.onnx  the EMA generator of a checkpoint
  catexport gen.safetensors -o cats.onnx                       released weights
  catexport gen.onnx --web page                                a web page that generates images in the browser
  catexport models:/catgan@champion --data out/cats            from MLflow's registry, with evaluation
  catexport out/runs/mine -o release/cats.onnx --precision fp32,fp16,int8 --card
                                                               cats.onnx, cats-fp16.onnx, cats-int8.onnx, card.md
  catexport out/runs/mine --precision int8 --register catgan   a new version beside the champion
  catexport out/runs/mine --weights base                       both networks, for run.py --init-from base

Progress goes to stderr, one line of JSON to stdout: onnx, precision, max_abs_diff, files. --debug shows tracebacks.
"""


@dataclass(frozen=True)
class Options:
    """The command line's values, named like its options."""

    source: str
    out: Path
    precision: tuple[str, ...]
    uint8: bool
    data: str | None
    card: bool
    register: str | None
    tracking_uri: str | None
    force: bool
    web: Path | None
    weights: Path | None

    @property
    def needs_mlflow(self) -> bool:
        return is_in_mlflow(self.source) or self.register is not None


def parse(argv: list[str]) -> Options:
    """The options in ``argv``.

    Raises:
        UserError: values that are not allowed or do not go together, or a source that does not exist.
    """
    parser = _parser()
    options = Options(**vars(parser.parse_args(argv)))
    elsewhere = is_in_mlflow(options.source) or is_in_bucket(options.source)
    if not elsewhere:
        options = replace(options, source=str(local_path(options.source)))
        if not Path(options.source).exists():
            raise UserError(
                f"{options.source} does not exist; give a run's folder (here or in a bucket), a checkpoint folder, a"
                " gen.safetensors, or from MLflow runs:/ID or models:/NAME@ALIAS"
            )
    if options.web is not None and options.source.endswith(".onnx"):
        allowed = ("source", "web")
        others = [n for n, value in vars(options).items() if n not in allowed and value != parser.get_default(n)]
        if others:
            given = ", ".join("-o" if name == "out" else f"--{name.replace('_', '-')}" for name in others)
            raise UserError(
                f"{given}: the page has {options.source} as it is; give a run or checkpoint, or --web alone"
            )
    if options.out.is_dir():
        raise UserError(f"-o {options.out} is a folder; name the file, such as {options.out / 'gen.onnx'}")
    if options.out.suffix.lower() != ".onnx":  # it might be the weights, which would be replaced
        raise UserError(f"-o {options.out}: the file is an ONNX file; give a name that ends with .onnx")
    if options.weights is not None and elsewhere:
        raise UserError(
            f"--weights needs a run or a checkpoint on this machine, since the discriminator is in a checkpoint only;"
            f" {options.source} is given"
        )
    if options.web is not None and options.uint8:
        raise UserError("--web with --uint8: the page rounds to pixels itself; leave one of them out")
    if options.web is not None and options.web.resolve() in options.out.resolve().parents:
        raise UserError(
            f"-o {options.out} is inside --web {options.web}, which gets a gen.onnx of its own; choose another"
        )
    return options


def _parser() -> Parser:
    parser = Parser(NAME, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "source",
        metavar="CHECKPOINT_OR_RUN",
        help="a run's folder, its best/ folder, a gen.safetensors or a checkpoint folder; s3://bucket/runs/NAME; or "
        "in MLflow a run (runs:/ID, or the id alone) or a registered model (models:/NAME@ALIAS, models:/NAME/VERSION)",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=local_path,
        default=Path("gen.onnx"),
        help="the file to write, replaced if it exists (default gen.onnx)",
    )
    parser.add_argument(
        "--precision",
        metavar="P",
        type=_precisions,
        default=("fp32",),
        help="fp32 (default), fp16 or int8; several, separated by commas, write one file each, with -fp16 or -int8 "
        "appended to the name",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="round to pixels in the graph: image is uint8 [batch, size, size, 3], equal to what catinfer computes",
    )
    parser.add_argument(
        "--data",
        metavar="DIR_OR_URL",
        help="the training data, for the evaluation (default: as in the run's config.json); none: do not evaluate",
    )
    parser.add_argument("--card", action="store_true", help="also write card.md and samples.png beside FILE")
    parser.add_argument("--register", metavar="MODEL", help="also register each file as a version of MODEL in MLflow")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="of MLflow, such as http://localhost:5000 (default: MLFLOW_TRACKING_URI)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also write files that are more than 5%% worse, and register unevaluated ones",
    )
    parser.add_argument(
        "--web",
        metavar="DIR",
        type=local_path,
        help="also write a web page that generates images in the browser; with this the source may be a gen.onnx",
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        type=local_path,
        help="also write both networks of a checkpoint (of a run: its latest one) as gen.safetensors (the EMA) and "
        "disc.safetensors, from which another training can start: run.py --init-from DIR",
    )
    return parser


def _precisions(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)} is given, allowed are {', '.join(PRECISIONS)}, or several separated by commas"
        )
    return names
