"""The command line of ``catfid``, and what can be checked before anything is opened."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from catgan.command import Parser, number
from catgan.location import local_path
from trainer.features.extractors import CHOICES, MIN_FID
from trainer.metrics.catfid.neighbours import NUM_NEAREST, NUM_ROWS

NAME = "catfid"
METRICS = ("fid", "kid", "is", "pr", "cats", "copies", "ppl")
WITH_ERRORS = {"fid", "kid"}
"""Metrics whose standard error can be estimated from one set of images."""
NEED_IMAGES = frozenset(METRICS) - {"fid", "ppl"}
"""Metrics that need the images of both sides; for fid statistics are enough, ppl does not use REAL."""

_DESCRIPTION = """\
Measure how far FAKE is from REAL. Each side is a folder of images, a folder of shards (all splits, or --split), an .npz
of statistics (fid only; also from pytorch-fid --save-stats), or gen.onnx, which generates --num images of consecutive
seeds from --seed on. The folder of a training run stands for its best gen.onnx.

  fid     Fréchet distance of at least 2,048 images; lower is better. FID with pytorch-fid's InceptionV3 only, else fd
  kid     kernel distance, also of few images: mean over 100 random subsets of up to 1,000; lower is better
  is      Inception Score of FAKE: one clear class per image, and all classes; higher is better
  pr      precision and recall (k = 3), density and coverage (k = 5): is FAKE realistic, and does it cover REAL?
  cats    share of FAKE, and of REAL, that an ImageNet classifier calls a domestic cat
  copies  authenticity: share of FAKE that does not copy an image of REAL, which should be the training data
  ppl     perceptual path length of FAKE, a gen.onnx: how much its images change along --num paths between latents

The name of a result tells how it was computed: fid50k is the FID of 50,000 images, fd2k_efflite0 a Fréchet distance of
2,048 images in the features of EfficientNet-Lite0. Values of different names cannot be compared.
"""

_EXAMPLES = """\
examples:
  catfid out/cats out/runs/NAME                              # all splits; --split train is what training reports
  catfid out/cats gen.onnx --metrics fid --num 50000 --weights pt_inception-2015-12-05-6726825d.pth
  catfid photos/ generated/ --metrics kid,pr                 # two folders of images of the same size
  catfid out/cats gen.onnx --split train --metrics copies --neighbours nearest.png    # does it copy? see for yourself
  catfid out/cats new.onnx --against old.onnx                # is the difference more than noise?
  catfid out/cats gen.onnx --repeat 5                        # mean and standard deviation over five ranges of seeds
  catfid photos/ --save-stats photos.npz                     # for later use, here or in pytorch-fid
"""


@dataclass(frozen=True)
class Options:
    """The command line's values, named like its options."""

    real: str
    fake: str | None
    metrics: tuple[str, ...]
    """Empty if none are given."""
    extractor: str
    weights: str | None
    split: str | None
    num: int | None
    seed: int
    neighbours: Path | None
    against: str | None
    interval: bool
    repeat: int | None
    save_stats: Path | None
    force: bool

    @property
    def num_generated(self) -> int:
        """Images that a gen.onnx generates."""
        return self.num or MIN_FID

    @property
    def with_errors(self) -> bool:
        """Whether standard errors are needed."""
        return self.interval or self.against is not None


def parse(argv: list[str]) -> Options:
    """The options in ``argv``.

    Raises:
        UserError: values that are not allowed or do not go together, or a folder that cannot be written.
    """
    parser = _parser()
    options = Options(**vars(parser.parse_args(argv)))
    if options.fake is None and not options.save_stats:
        parser.error("FAKE is missing; it can be left out with --save-stats only")
    if options.fake is None and (options.metrics or options.repeat or options.with_errors):
        parser.error("--metrics, --against, --interval and --repeat need FAKE")
    if options.repeat and options.with_errors:
        parser.error("--repeat cannot be combined with --against or --interval, which estimate the spread themselves")
    if options.with_errors and (others := set(options.metrics) - WITH_ERRORS):
        parser.error(f"{', '.join(sorted(others))}: intervals exist for fid and kid only; use --repeat")
    if options.save_stats and options.save_stats.suffix != ".npz":
        parser.error(f"--save-stats {options.save_stats}: the name must end in .npz")
    if options.neighbours and "copies" not in options.metrics:
        parser.error("--neighbours is an option of --metrics copies: add that, or leave both out")
    for option, path in (("--neighbours", options.neighbours), ("--save-stats", options.save_stats)):
        if path and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            parser.error(f"{option} {path}: its folder does not exist or cannot be written; create it first")
    return options


def _parser() -> Parser:
    parser = Parser(NAME, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("real", metavar="REAL", help="the real images")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the images to evaluate")
    parser.add_argument(
        "--metrics",
        type=_metrics,
        default=(),
        metavar="LIST",
        help=f"names of {', '.join(METRICS)}, separated by commas (default: fid and kid, as far as possible)",
    )
    parser.add_argument(
        "--extractor",
        choices=CHOICES,
        default="auto",
        help="metric network; auto (default): inception if its weights are available, else efflite0",
    )
    parser.add_argument("--weights", metavar="PATH", help="pytorch-fid's InceptionV3 weights (a .pth file)")
    parser.add_argument("--split", choices=("train", "val"), help="split of a folder of shards (default: all)")
    parser.add_argument(
        "--num", type=number(int, 2, 10**7), metavar="N", help=f"images that gen.onnx generates (default: {MIN_FID})"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**62),
        default=0,
        metavar="N",
        help="seed of gen.onnx's first image, and of kid's subsets (default: %(default)s)",
    )
    parser.add_argument(
        "--neighbours",
        type=local_path,
        metavar="PNG",
        help=f"with copies: write a sheet of {NUM_ROWS} images of FAKE, each beside the {NUM_NEAREST} nearest of REAL",
    )
    parser.add_argument(
        "--against", metavar="OTHER", help="also evaluate OTHER, and tell whether the difference is more than noise"
    )
    parser.add_argument("--interval", action="store_true", help="95%% confidence intervals of fid and kid")
    parser.add_argument(
        "--repeat",
        type=number(int, 2, 1000),
        metavar="N",
        help="evaluate a gen.onnx N times with different seeds; gives mean and standard deviation",
    )
    parser.add_argument(
        "--save-stats", type=local_path, metavar="NPZ", help="write REAL's statistics; FAKE can be left out"
    )
    parser.add_argument("--force", action="store_true", help=f"allow fid of fewer than {MIN_FID:,} images, mostly bias")
    return parser


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is given, allowed are {', '.join(METRICS)}")
    return names
