"""``catfid``: how far apart two sets of pictures are."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from catgan.command import Parser, UserError, number, run_command, say
from catgan.files import atomic_path
from trainer.features.extractors import CHOICES, MIN_FID, choose_extractor, imagenet_classifier
from trainer.metrics.catfid.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS
from trainer.metrics.catfid.measure import Measured, distances, errors, measure, perceptual_path_length
from trainer.metrics.catfid.neighbours import NEAREST, SHOWN, neighbour_sheet
from trainer.metrics.catfid.scores import SPLITS
from trainer.metrics.catfid.sides import Pictures, measures, open_side
from trainer.metrics.evaluate import metric_name
from trainer.metrics.frechet import Gaussian
from trainer.metrics.intervals import GROUPS, compare, interval

NAME = "catfid"
METRICS = ("fid", "kid", "is", "pr", "cats", "copies", "ppl")
_DEFAULT = ("fid", "kid")
_OF_PICTURES = set(METRICS) - {"fid", "ppl"}
_WITH_INTERVAL = {"fid", "kid"}

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
  ppl     perceptual path length of FAKE, a gen.onnx: how much its pictures change along --num paths between latents

The name of a result says how it was measured: fid50k is a FID of 50,000 fakes, fd2k_efflite0 a Fréchet distance of
2,048 in the features of EfficientNet-Lite0. Values under different names cannot be compared.
"""

_EXAMPLES = """\
examples:
  catfid out/cats out/runs/NAME/best/gen.onnx                # of all splits; --split train is what training shows
  catfid out/cats gen.onnx --metrics fid --num 50000 --weights pt_inception-2015-12-05-6726825d.pth
  catfid photos/ generated/ --metrics kid,pr                 # two folders of pictures of one size
  catfid out/cats gen.onnx --split train --metrics copies --neighbours nearest.png    # did it copy? see for yourself
  catfid out/cats new.onnx --against old.onnx                # is the difference more than noise?
  catfid out/cats gen.onnx --repeat 5                        # mean and spread over five ranges of seeds
  catfid photos/ --save-stats photos.npz                     # for later, here or in pytorch-fid
"""


def _metrics(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is given, allowed are {', '.join(METRICS)}")
    return names


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(NAME, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("real", metavar="REAL", help="the pictures to compare with")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the pictures to judge")
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
    parser.add_argument(
        "--against", metavar="OTHER", help="judge OTHER like FAKE, and whether the two differ by more than noise"
    )
    parser.add_argument(
        "--interval", action="store_true", help="95%% intervals of fid and kid: what other fakes might have given"
    )
    parser.add_argument(
        "--repeat",
        type=number(int, 2, 1000),
        metavar="N",
        help="measure a gen.onnx N times, each with the seeds after the last; gives mean and standard deviation",
    )
    parser.add_argument("--save-stats", metavar="NPZ", help="write REAL's statistics; FAKE may then be left out")
    parser.add_argument("--force", action="store_true", help=f"fid of fewer than {MIN_FID:,} fakes, mostly bias")
    options = parser.parse_args(argv)
    if options.fake is None and not options.save_stats:
        parser.error("FAKE is missing; only --save-stats can do without")
    if options.fake is None and (options.metrics or options.against or options.repeat or options.interval):
        parser.error("--metrics, --against, --interval and --repeat need FAKE")
    if options.repeat and (options.against or options.interval):
        parser.error("--repeat goes with neither --against nor --interval, which have an estimate of the spread")
    if (options.against or options.interval) and (rest := set(options.metrics or []) - _WITH_INTERVAL):
        parser.error(f"{', '.join(sorted(rest))}: intervals are known of fid and kid only; --repeat does it for all")
    if options.save_stats and not options.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {options.save_stats}: the name must end in .npz")
    if options.neighbours and "copies" not in (options.metrics or []):
        parser.error("--neighbours belongs to --metrics copies: add it, or leave both out")
    for option, path in (("--neighbours", options.neighbours), ("--save-stats", options.save_stats)):
        if path and not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK):
            parser.error(f"{option} {path}: there is no such folder, or it cannot be written; make one first")
    return options


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catfid`` with these arguments. Returns the JSON object of the command."""
    began = time.perf_counter()
    options = _parse(argv)
    locations = {"REAL": options.real, "FAKE": options.fake, "OTHER": options.against}
    sides = {
        what: open_side(location, split=options.split, num=options.num or MIN_FID, seed=options.seed)
        for what, location in locations.items()
        if location
    }
    if options.metrics is None:
        options.metrics = _default_metrics(sides, options)
    _check(sides, options)
    extractor = choose_extractor(options.extractor, options.weights)
    for what, side in sides.items():
        if isinstance(side, Gaussian) and side.dim != extractor.dim:
            raise UserError(
                f"the statistics of {what} have {side.dim} dimensions, {extractor.name} has {extractor.dim}: "
                "give the pictures, or the extractor that made them"
            )
    classify = imagenet_classifier() if "cats" in options.metrics else None
    keep_real = bool(_OF_PICTURES & set(options.metrics))
    keep = keep_real or options.interval or bool(options.against)
    result: dict[str, Any] = {"metrics": {}}
    real = None
    if options.metrics != ["ppl"] or options.save_stats:
        real = measure(sides["REAL"], "REAL", extractor, keep_real, classify)
    if options.save_stats:
        assert real is not None
        real.gaussian.save(Path(options.save_stats))
        result["save_stats"] = options.save_stats

    def judge(side: Pictures | Gaussian, what: str, seed: int) -> _Judged:
        number = _number(side)
        assert number is not None
        name = partial(metric_name, extractor=extractor.name, num_fake=number, force=options.force)
        values: dict[str, float] = {}
        more: dict[str, float] = {}
        noise: dict[str, float] = {}
        fake = None
        if real is not None and options.metrics != ["ppl"]:
            fake = measure(side, what, extractor, keep, classify)
            values, more = distances(options.metrics, real, fake, extractor, name, options.seed)
            if options.interval or options.against:
                noise = errors(options.metrics, real, fake, name, more.get("kid_std"))
        if "ppl" in options.metrics:
            assert isinstance(side, Pictures)
            assert side.generator is not None
            values[name("ppl")] = perceptual_path_length(side.generator, extractor, side.count, seed)
        return _Judged(values, more, noise, fake)

    if options.fake:
        fake = judge(sides["FAKE"], "FAKE", options.seed)
        result |= {"metrics": fake.values, **fake.more}
        if fake.noise:
            result |= _with_intervals(fake)
        if options.repeat:
            result |= _repeated(fake, judge, options)
        if options.against:
            result["against"] = _against(fake, judge(sides["OTHER"], "OTHER", options.seed))
        if options.neighbours:
            _draw_neighbours(sides["REAL"], real, fake.measured, Path(options.neighbours))
            result["neighbours"] = options.neighbours
    for name, value in result["metrics"].items():
        say(f"{name} {value:.4g}{_spread(result, name)}")
    return result | {
        "n_real": real.gaussian.n if real else _number(sides["REAL"]),
        "n_fake": _number(sides["FAKE"]) if options.fake else None,
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began, 2),
    }


@dataclass(frozen=True)
class _Judged:
    """Metrics of one side and what goes with them, their standard errors, and what they were computed of."""

    values: dict[str, float]
    more: dict[str, float]
    noise: dict[str, float]
    measured: Measured | None


def _with_intervals(judged: _Judged) -> dict[str, Any]:
    return {
        "standard_error": judged.noise,
        "interval95": {name: interval(judged.values[name], error) for name, error in judged.noise.items()},
    }


def _repeated(
    first: _Judged, judge: Callable[[Pictures | Gaussian, str, int], _Judged], options: argparse.Namespace
) -> dict[str, Any]:
    """Mean and standard deviation over ranges of seeds that have none in common."""
    num = options.num or MIN_FID
    seeds = num * (2 if "ppl" in options.metrics else 1)  # a path has two ends
    runs = [first.values]
    for i in range(1, options.repeat):
        seed = options.seed + i * seeds
        side = open_side(options.fake, split=None, num=num, seed=seed)
        runs.append(judge(side, f"FAKE, {i + 1} of {options.repeat}", seed).values)
    columns = {name: [run[name] for run in runs] for name in first.values}
    return {
        "metrics": {name: statistics.fmean(values) for name, values in columns.items()},
        "std": {name: statistics.stdev(values) for name, values in columns.items()},
        "repeats": runs,
    }


def _against(fake: _Judged, other: _Judged) -> dict[str, Any]:
    """The other side's metrics, and for each the difference with its interval; says the verdicts."""
    found: dict[str, Any] = {}
    for name, value in fake.values.items():
        comparison = compare(value, fake.noise[name], other.values[name], other.noise[name])
        found[name] = asdict(comparison) | {"more_than_noise": comparison.more_than_noise}
        low, high = comparison.interval
        verdict = "better" if comparison.difference < 0 else "worse"
        say(
            f"{name}: FAKE and OTHER are equal"
            if comparison.difference == 0
            else f"{name}: FAKE is {verdict} than OTHER by {abs(comparison.difference):.4g} (difference {low:.4g} to "
            f"{high:.4g} with 95 %), {'more than' if comparison.more_than_noise else 'which can be'} noise"
        )
    return {"metrics": other.values, **_with_intervals(other), "difference": found}


def _spread(result: dict[str, Any], name: str) -> str:
    if name in result.get("std", {}):
        return f" (standard deviation {result['std'][name]:.2g} of {len(result['repeats'])})"
    if name in result.get("interval95", {}):
        return " ({:.4g} to {:.4g} with 95 %)".format(*result["interval95"][name])
    return ""


def _draw_neighbours(reals: Pictures | Gaussian, real: Measured | None, fake: Measured | None, path: Path) -> None:
    assert isinstance(reals, Pictures)
    assert real is not None
    assert fake is not None
    sheet = neighbour_sheet(fake.shown, fake.features[: len(fake.shown)], real.features, reals.batches())
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def _default_metrics(sides: dict[str, Pictures | Gaussian], options: argparse.Namespace) -> list[str]:
    if any(isinstance(side, Gaussian) for side in sides.values()):
        return ["fid"]
    if not options.fake:
        return []
    count = _number(sides["FAKE"]) or 0
    if count >= MIN_FID or options.force:
        return list(_DEFAULT)
    say(f"kid only: FAKE has {count:,} pictures, fid needs {MIN_FID:,} (or --force)")
    return ["kid"]


def _number(side: Pictures | Gaussian) -> int | None:
    return side.count if isinstance(side, Pictures) else side.n


def _check(sides: dict[str, Pictures | Gaussian], options: argparse.Namespace) -> None:
    """Whether these sides can be compared by these metrics."""
    pictures = {what: side for what, side in sides.items() if isinstance(side, Pictures)}
    kinds = [side.kind for side in pictures.values()]
    for option, kind in (("split", "shards"), ("num", "onnx")):
        if getattr(options, option) is not None and kind not in kinds:
            what = "a folder of shards" if kind == "shards" else "a gen.onnx"
            raise UserError(f"--{option} is given, but neither side is {what}: leave it out")
    sizes = {what: side.size for what, side in pictures.items()}
    if len(set(sizes.values())) > 1:
        all_sizes = ", ".join(f"{what} is {measures(size)}" for what, size in sizes.items())
        raise UserError(f"{all_sizes}: resize one side (catdata build --size), or the distance would measure sharpness")
    judged = {what: side for what, side in sides.items() if what != "REAL"}
    for what, side in judged.items():
        _check_judged(what, side, sides["REAL"], options)
    if len({_number(side) for side in judged.values()}) > 1:
        raise UserError(
            f"FAKE has {_number(sides['FAKE'])}, OTHER has {_number(sides['OTHER'])} pictures: distances of different "
            "numbers cannot be compared, give as many of each"
        )
    n_real = _number(sides["REAL"])
    if n_real is not None and n_real < 2:
        raise UserError(f"REAL has {n_real} pictures: at least 2 are needed")
    if "fid" in options.metrics and n_real is not None and n_real < MIN_FID:
        say(f"warning: with only {n_real:,} real pictures a Fréchet distance is biased upwards; kid is not")


def _check_judged(what: str, side: Pictures | Gaussian, real: Pictures | Gaussian, options: argparse.Namespace) -> None:
    location = options.fake if what == "FAKE" else options.against
    kind = side.kind if isinstance(side, Pictures) else "npz"
    if kind != "onnx":
        if "ppl" in options.metrics:
            raise UserError(f"ppl follows paths between latents: {what} must be a gen.onnx, {location} is none")
        if options.repeat:
            raise UserError(
                f"--repeat makes pictures of other seeds: {what} must be a gen.onnx, {location} is none; for pictures "
                "--interval tells what chance does"
            )
    if "ppl" in options.metrics and isinstance(side, Pictures) and side.generator and side.generator.is_uint8:
        raise UserError(f"ppl follows changes below one level of a pixel: {location} rounds; export it without --uint8")
    if (rest := [m for m in options.metrics if m in _OF_PICTURES]) and (isinstance(real, Gaussian) or kind == "npz"):
        raise UserError(
            f"{', '.join(rest)}: the pictures of both sides are needed, an .npz has statistics only; use --metrics fid"
        )
    if (options.interval or options.against) and kind == "npz":
        raise UserError(f"intervals need the pictures of {what}, {location} has statistics only")
    n_real, n_fake = _number(real), _number(side)
    if n_fake is None:
        raise UserError(f"{location} does not tell its number of pictures (n), which is part of the result's name")
    if min(n_fake, n_real or 2) < 2:
        raise UserError(f"REAL has {n_real}, {what} has {n_fake} pictures: at least 2 of each are needed")
    if (options.interval or options.against) and n_fake < 2 * GROUPS:
        raise UserError(f"intervals need {2 * GROUPS} pictures of {what}, it has {n_fake}")
    least = {"is": (0, SPLITS), "pr": (DENSITY_NEIGHBOURS + 1, NEIGHBOURS + 1)}
    for metric in set(options.metrics) & set(least):
        if (n_real or 0) < least[metric][0] or n_fake < least[metric][1]:
            raise UserError(
                f"{metric} needs {least[metric][0]} real and {least[metric][1]} generated pictures at least, REAL has "
                f"{n_real}, {what} has {n_fake}: add pictures, or use --metrics kid"
            )
    if "fid" in options.metrics and n_fake < MIN_FID:
        if not options.force:
            raise UserError(
                f"fid needs at least {MIN_FID:,} fakes, {what} has {n_fake:,}: add pictures, or use --metrics kid "
                "(--force computes it all the same)"
            )
        say(f"warning: the Fréchet distance of only {n_fake:,} fakes is mostly bias; kid is not")


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
