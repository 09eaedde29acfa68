"""``catexport``: a trained generator as one ONNX file.

PyTorch is imported once the arguments are known to be right, so ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import Parser, UserError, run_command, say
from export.source import WEIGHTS, Source, is_in_bucket, is_in_mlflow, open_source

if TYPE_CHECKING:
    from export.variants import Variant
    from trainer.metrics.evaluate import Evaluator

NAME = "catexport"
PRECISIONS = ("fp32", "fp16", "int8")

_DESCRIPTION = """\
Write a trained generator as one ONNX file for catinfer, and check that onnxruntime draws the same pictures with it as
PyTorch does. Training exports its best generator by itself (RUN/best/gen.onnx); this is for any other, and for files
that are smaller:

  fp32  as trained
  fp16  half the size; fast on GPUs, on CPUs slower than fp32
  int8  a quarter of the size; weights and activations in 8 bits, with scales found by drawing 128 pictures

Where the training data can be had, each file is judged by the metric of the training. What is more than 5% worse than
fp32 is not written (--force does).
"""
_EPILOG = """\
examples:
  catexport out/runs/mine                                    the run's best generator, to gen.onnx
  catexport out/runs/mine/checkpoint_000000512000 -o 512.onnx  the averaged generator of one checkpoint
  catexport gen.safetensors -o cats.onnx                     released weights
  catexport gen.onnx --web page                              a page that draws its pictures in the browser
  catexport models:/catgan@champion --data out/cats          from MLflow's registry, judged
  catexport out/runs/mine -o release/cats.onnx --precision fp32,fp16,int8 --card
                                                             cats.onnx, cats-fp16.onnx, cats-int8.onnx, card.md
  catexport out/runs/mine --precision int8 --register catgan   a new version beside the champion

Progress goes to stderr, one line of JSON to stdout: onnx, precision, max_abs_diff, files. --debug shows tracebacks.
"""


def _precisions(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)} is given, allowed are {', '.join(PRECISIONS)}, or several separated by commas"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = Parser(NAME, _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "source",
        metavar="CHECKPOINT_OR_RUN",
        help="a run's folder, its best/ folder, a gen.safetensors or a checkpoint folder; s3://bucket/runs/NAME; or "
        "from MLflow a run "
        "(runs:/ID, or the id alone) or a registered model (models:/NAME@ALIAS, models:/NAME/VERSION)",
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
        "--precision",
        metavar="P",
        type=_precisions,
        default=["fp32"],
        help="fp32 (default), fp16 or int8; several, separated by commas, write a file each, with -fp16 or -int8 added "
        "to the name",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="the graph itself rounds to pixels: image is uint8 [batch, size, size, 3], equal to what catinfer makes",
    )
    parser.add_argument(
        "--data",
        metavar="DIR_OR_URL",
        help="the shards it was trained on, to judge with (default: where the run's config.json says); none: do not",
    )
    parser.add_argument("--card", action="store_true", help="also write card.md and samples.png beside FILE")
    parser.add_argument("--register", metavar="MODEL", help="also register each file as a version of MODEL in MLflow")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="of MLflow, such as http://localhost:5000 (default: MLFLOW_TRACKING_URI)"
    )
    parser.add_argument(
        "--force", action="store_true", help="write and register also what is more than 5%% worse, or was not judged"
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
    uri = _check(args)
    if args.web is not None:
        from export.page import check_folder, write_page

        check_folder(args.web)
        if args.uint8:
            raise UserError("--web with --uint8: the page rounds to pixels itself; leave one of them out")
        if args.source.endswith(".onnx"):
            write_page(Path(args.source), args.web)
            return {"web": str(args.web)}
        if args.web.resolve() in args.out.resolve().parents:
            raise UserError(f"-o {args.out} lies in --web {args.web}, which gets a gen.onnx of its own; choose another")
    source = open_source(args.source, uri)
    info = source.info
    if args.register and not info.get("run_id"):
        raise UserError(f"--register: {args.source} does not say which MLflow run it comes from")
    from export.evaluate import with_judgement
    from export.variants import loses_too_much, make_variants

    say(f"exporting {info['recipe']} at {info['kimg']:g} kimg")
    evaluator = _evaluator(info, args.data, source.data)
    targets = _targets(args.out, args.precision)
    with _beside(args.out) as folder:
        made = {p: folder / f"{p}.onnx" for p in dict.fromkeys(["fp32", *args.precision])}
        variants = {v.precision: v for v in make_variants(source.generator, info, made, args.uint8, evaluator)}
        info = with_judgement(info, variants["fp32"].metric)
        wanted = [variants[precision] for precision in targets]
        bad = loses_too_much(wanted)
        if bad and not args.force:
            losses = ", ".join(f"{v.precision} by {v.loss:.1%}" for v in bad)
            raise UserError(f"worse than fp32: {losses}, allowed are 5%; nothing was written, --force writes it")
        unjudged = [v.precision for v in wanted if v.precision != "fp32" and v.loss is None]
        if args.register and unjudged and not args.force:
            raise UserError(f"--register: {', '.join(unjudged)} was not judged; give --data, or --force")
        for precision, target in targets.items():
            made[precision].replace(target)
        for v in wanted:
            _tell(targets[v.precision], v)
        result: dict[str, Any] = {
            "onnx": str(targets[wanted[0].precision]),
            "precision": wanted[0].precision,
            "max_abs_diff": wanted[0].max_abs_diff,
            "files": [{"onnx": str(targets[v.precision]), **v.summary()} for v in wanted],
        }
        shown = [variants["fp32"], *(v for v in wanted if v.precision != "fp32")]
        if args.card:
            from export.card import write_card

            card = write_card(targets[wanted[0].precision], info, wanted[0].max_abs_diff, shown)
            result["card"] = str(card)
        if args.register:
            result["versions"] = [
                _register(folder, targets[v.precision], args.register, str(uri), source, info, v, shown) for v in wanted
            ]
        if args.web is not None:
            write_page(targets[wanted[0].precision], args.web)
            result["web"] = str(args.web)
    return result


def _check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, before PyTorch is loaded. Returns MLflow's URI if it is needed."""
    elsewhere = is_in_mlflow(args.source) or is_in_bucket(args.source)
    if not elsewhere and not Path(args.source).exists():
        raise UserError(
            f"{args.source} does not exist; give a run's folder (here or in a bucket), a checkpoint folder, a"
            " gen.safetensors, or from MLflow runs:/ID or models:/NAME@ALIAS"
        )
    if args.out.is_dir():
        raise UserError(f"-o {args.out} is a folder; name the file, such as {args.out / 'gen.onnx'}")
    if not (is_in_mlflow(args.source) or args.register):
        return None
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "which MLflow? Give --tracking-uri (http://HOST:PORT, sqlite:///PATH.db) or MLFLOW_TRACKING_URI"
        )
    from trainer.tracking.server import check_reachable, resolve_uri

    uri = resolve_uri(uri, Path())
    check_reachable(uri)
    return uri


def _targets(out: Path, precisions: list[str]) -> dict[str, Path]:
    if len(precisions) == 1:
        return {precisions[0]: out}
    return {p: out if p == "fp32" else out.with_stem(f"{out.stem}-{p}") for p in precisions}


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that lasts as long as the work, on the file system of ``out``."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".catexport-", dir=out.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.filename or out.parent}: {error.strerror or error})") from error


def _evaluator(info: Mapping[str, Any], data: str | None, recorded: str | None) -> Evaluator | None:
    """None if the files are not to be judged, or cannot be."""
    if data == "none":
        return None
    location = data or recorded
    if location is None:
        say("not judged: where the training data are is not known (--data)")
        return None
    from export.evaluate import open_evaluator

    try:
        return open_evaluator(info, location)
    except UserError as error:
        if data is not None:
            raise
        say(f"not judged: {error}")
        return None


def _tell(path: Path, variant: Variant) -> None:
    text = f"{path}: differs from PyTorch by {variant.max_abs_diff:.1e} at most"
    if variant.speed is not None:
        text += f", {variant.size:.2f} times the size and {variant.speed:.2f} times the speed of fp32"
    if variant.metric is not None:
        text += f", {variant.metric['name']} {variant.metric['value']:.2f}"
    if variant.loss is not None:
        text += f" ({variant.loss:+.1%})"
    say(text)


def _register(
    folder: Path,
    onnx: Path,
    model: str,
    uri: str,
    source: Source,
    info: Mapping[str, Any],
    variant: Variant,
    shown: Sequence[Variant],
) -> str:
    """A version of the model, with its own card and the weights it was made from."""
    from export.card import write_card
    from export.registry import register
    from trainer.tracking.server import as_user_errors, connect, find_run

    release = Path(tempfile.mkdtemp(dir=folder), onnx.name)
    shutil.copyfile(onnx, release)
    write_card(release, info, variant.max_abs_diff, shown)
    if source.weights is not None:
        release.with_name(WEIGHTS).write_bytes(source.weights)
    with as_user_errors(uri):
        find_run(connect(uri), uri, info["run_id"])
        version = register(uri, info["run_id"], model, release, info)
    say(f"registered as models:/{model}/{version}")
    return version


def entry() -> None:
    run_command(NAME, main)
