"""``catfid``: how far apart two sets of pictures are."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infer.command import Parser, UserError, number, run_command, say
from trainer.metrics.cache import replacing
from trainer.metrics.evaluate import MIN_FID, metric_name
from trainer.metrics.extractors import CHOICES, Extractor, choose_extractor, imagenet_classifier
from trainer.metrics.frechet import Gaussian, Moments, frechet_distance
from trainer.metrics.kernel import kernel_distance
from trainer.metrics.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS, authenticity, density_coverage, precision_recall
from trainer.metrics.neighbours import NEAREST, SHOWN, neighbour_sheet
from trainer.metrics.scores import SPLITS, cat_share, inception_score
from trainer.metrics.sides import Pictures, measures, open_side

NAME = "catfid"
METRICS = ("fid", "kid", "is", "pr", "cats", "copies")
_DEFAULT = ("fid", "kid")
_OF_PICTURES = set(METRICS) - {"fid"}

_DESCRIPTION = """\
Measure how far FAKE is from REAL. Each side is a folder of pictures, a folder of shards (all splits,
or --split), an .npz of statistics (fid only; also from pytorch-fid --save-stats), or gen.onnx, which makes --num
pictures of the seeds from --seed on.

  fid     Fréchet distance, from 2,048 fakes on; lower is better. FID only with pytorch-fid's InceptionV3, else fd
  kid     kernel distance, for small sets too: mean over 100 random subsets of up to 1,000 pictures; lower is better
  is      Inception Score of FAKE: sure of each picture's class, and of all classes; higher is better
  pr      precision and recall (k = 3), density and coverage (k = 5): are fakes like reals, are all reals covered?
  cats    the share of FAKE that ImageNet's classes call a cat, and of REAL
  copies  authenticity: the share of FAKE that is no copy of REAL, which should be what was trained on

The name of a result says how it was measured: fid50k is a FID of 50,000 fakes, fd2k_efflite0 a Fréchet distance of
2,048 in the features of EfficientNet-Lite0. Values under different names cannot be compared.
"""

_EXAMPLES = """\
examples:
  catfid out/cats out/runs/NAME/best/gen.onnx                # of all splits; --split train is what training shows
  catfid out/cats gen.onnx --metrics fid --num 50000 --weights pt_inception-2015-12-05-6726825d.pth
  catfid photos/ generated/ --metrics kid,pr                 # two folders of pictures of one size
  catfid out/cats gen.onnx --split train --metrics copies --neighbours nearest.png    # did it copy? see for yourself
"""


def _metrics(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is given, allowed are {', '.join(METRICS)}")
    return names


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(NAME, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("real", metavar="REAL", help="the pictures to compare with")
    parser.add_argument("fake", metavar="FAKE", help="the pictures to judge")
    parser.add_argument(
        "--metrics",
        type=_metrics,
        metavar="LIST",
        help=f"names of {', '.join(METRICS)}, separated by commas (default: fid and kid, if these sides allow)",
    )
    parser.add_argument(
        "--extractor",
        choices=CHOICES,
        default="auto",
        help="network whose features are compared; auto (default): inception if its weights can be had, else efflite0",
    )
    parser.add_argument("--weights", metavar="PATH", help="pytorch-fid's InceptionV3 weights (a .pth file)")
    parser.add_argument("--split", choices=("train", "val"), help="of a folder of shards (default: all pictures)")
    parser.add_argument(
        "--num", type=number(int, 2, 10**7), metavar="N", help=f"pictures that gen.onnx makes (default: {MIN_FID})"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**62),
        default=0,
        metavar="N",
        help="first seed of gen.onnx's pictures, and seed of kid's subsets (default: %(default)s)",
    )
    parser.add_argument(
        "--neighbours",
        metavar="PNG",
        help=f"with copies: write a sheet of {SHOWN} fakes, each beside the {NEAREST} reals that are nearest to it",
    )
    options = parser.parse_args(argv)
    if options.neighbours and "copies" not in (options.metrics or []):
        parser.error("--neighbours belongs to --metrics copies: add it, or leave both out")
    if options.neighbours and not Path(options.neighbours).absolute().parent.is_dir():
        parser.error(f"--neighbours {options.neighbours}: there is no such folder, make it first")
    return options


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catfid`` with these arguments. Returns the JSON object of the command."""
    began = time.perf_counter()
    options = _parse(argv)
    sides = {
        what: open_side(location, split=options.split, num=options.num or MIN_FID, seed=options.seed)
        for what, location in (("REAL", options.real), ("FAKE", options.fake))
    }
    if options.metrics is None:
        options.metrics = _default_metrics(sides["REAL"], sides["FAKE"])
    n_real, n_fake = _check(sides, options)
    assert n_fake is not None
    extractor = choose_extractor(options.extractor, options.weights)
    if "fid" in options.metrics:
        metric_name("fid", extractor.name, n_fake)  # refuses before the work what cannot be named after it
    for what, side in sides.items():
        if isinstance(side, Gaussian) and side.dim != extractor.dim:
            raise UserError(
                f"the statistics of {what} have {side.dim} dimensions, {extractor.name} has {extractor.dim}: "
                "give the pictures, or the extractor that made them"
            )
    classify = imagenet_classifier() if "cats" in options.metrics else None
    keep = bool(_OF_PICTURES & set(options.metrics))
    real, fake = (_measure(side, what, extractor, keep, classify) for what, side in sides.items())
    result = _metrics_of(real, fake, extractor, options, lambda metric: metric_name(metric, extractor.name, n_fake))
    if options.neighbours:
        reals = sides["REAL"]
        assert isinstance(reals, Pictures)
        sheet = neighbour_sheet(fake.shown, fake.features[: len(fake.shown)], real.features, reals.batches())
        with replacing(Path(options.neighbours)) as temporary:
            sheet.save(temporary, "PNG")
        result["neighbours"] = options.neighbours
    for name, value in result["metrics"].items():
        say(f"{name} {value:.4g}")
    return result | {
        "n_real": n_real,
        "n_fake": n_fake,
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _default_metrics(real: Pictures | Gaussian, fake: Pictures | Gaussian) -> list[str]:
    if isinstance(real, Gaussian) or isinstance(fake, Gaussian):
        return ["fid"]
    if fake.count >= MIN_FID:
        return list(_DEFAULT)
    say(f"kid only: FAKE has {fake.count:,} pictures, fid needs {MIN_FID:,}")
    return ["kid"]


def _check(sides: dict[str, Pictures | Gaussian], options: argparse.Namespace) -> tuple[int | None, int | None]:
    """Whether these sides can be compared by these metrics. Returns the pictures of REAL and FAKE."""
    pictures = {what: side for what, side in sides.items() if isinstance(side, Pictures)}
    kinds = [side.kind for side in pictures.values()]
    for option, kind in (("split", "shards"), ("num", "onnx")):
        if getattr(options, option) is not None and kind not in kinds:
            what = "a folder of shards" if kind == "shards" else "a gen.onnx"
            raise UserError(f"--{option} is given, but neither side is {what}: leave it out")
    sizes = {what: side.size for what, side in pictures.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(
            f"REAL is {measures(sizes['REAL'])}, FAKE is {measures(sizes['FAKE'])}: resize one side "
            "(catdata build --size), or the distance would measure sharpness"
        )
    if (rest := [m for m in options.metrics if m in _OF_PICTURES]) and len(pictures) < 2:
        raise UserError(
            f"{', '.join(rest)}: the pictures of both sides are needed, an .npz has statistics only; use --metrics fid"
        )
    n_real, n_fake = (side.count if isinstance(side, Pictures) else side.n for side in sides.values())
    if n_fake is None:
        raise UserError(f"{options.fake} does not tell its number of pictures (n), which is part of the result's name")
    if min(n_fake, n_real or 2) < 2:
        raise UserError(f"REAL has {n_real}, FAKE has {n_fake} pictures: at least 2 of each are needed")
    least = {"is": (0, SPLITS), "pr": (DENSITY_NEIGHBOURS + 1, NEIGHBOURS + 1)}
    for metric in set(options.metrics) & set(least):
        if (n_real or 0) < least[metric][0] or n_fake < least[metric][1]:
            raise UserError(
                f"{metric} needs {least[metric][0]} real and {least[metric][1]} generated pictures at least, REAL has "
                f"{n_real}, FAKE has {n_fake}: add pictures, or use --metrics kid"
            )
    if "fid" in options.metrics and n_fake < MIN_FID:
        raise UserError(
            f"fid needs at least {MIN_FID:,} fakes, FAKE has {n_fake:,}: add pictures, or use --metrics kid"
        )
    if "fid" in options.metrics and n_real is not None and n_real < MIN_FID:
        say(f"warning: with only {n_real:,} real pictures a Fréchet distance is biased upwards; kid is not")
    return n_real, n_fake


@dataclass(frozen=True)
class _Measured:
    """What is known of a side: statistics; the first pictures; and, where they are to be kept, features ``[n, dim]``
    and the classes' probabilities ``[n, 1000]``."""

    gaussian: Gaussian
    shown: Tensor
    features: Tensor
    probabilities: Tensor


def _measure(
    side: Pictures | Gaussian, what: str, extractor: Extractor, keep: bool, classify: Callable[[Tensor], Tensor] | None
) -> _Measured:
    shown = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    kept = [torch.empty(0, extractor.dim, device=extractor.device)]
    classes = [torch.empty(0, 1000)]
    if isinstance(side, Gaussian):
        return _Measured(side, shown, kept[0], classes[0])
    moments = Moments(extractor.dim, extractor.device)
    with tqdm(total=side.count, desc=what, unit="img", leave=False) as bar:
        for images in side.batches():
            if not len(shown):
                shown = images[:SHOWN]
            features = extractor(images)
            moments.update(features)
            if keep:
                kept.append(features)
            if classify:
                classes.append(classify(images))
            bar.update(len(images))
    # Unusable samples of shards are passed over, a few of them.
    assert side.kind == "shards" or moments.n == side.count, (moments.n, side.count)
    return _Measured(moments.gaussian(), shown, torch.cat(kept), torch.cat(classes))


def _metrics_of(
    real: _Measured, fake: _Measured, extractor: Extractor, options: argparse.Namespace, name: Callable[[str], str]
) -> dict[str, Any]:
    """``metrics`` by their full names, and what goes with some of them."""
    wanted = options.metrics
    values: dict[str, float] = {}
    more: dict[str, float] = {}
    if "fid" in wanted:
        values[name("fid")] = frechet_distance(real.gaussian, fake.gaussian)
    if "kid" in wanted:
        values[name("kid")], more["kid_std"] = kernel_distance(real.features, fake.features, options.seed)
    if "is" in wanted:
        values[name("is")], more["is_std"] = inception_score(extractor.logits(fake.features))
    if "pr" in wanted:
        values[name("precision")], values[name("recall")] = precision_recall(real.features, fake.features)
        values[name("density")], values[name("coverage")] = density_coverage(real.features, fake.features)
    if "cats" in wanted:
        values[name("cats").partition("_")[0]] = cat_share(fake.probabilities)
        more["cats_real"] = cat_share(real.probabilities)
    if "copies" in wanted:
        values[name("authenticity")] = authenticity(real.features, fake.features)
    return {"metrics": values, **more}


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
