"""``catdata``: make data sets of pictures, and check them."""

from __future__ import annotations

import argparse
from typing import Any

from catgan.command import Parser, dispatch, number, run_command, say
from catgan.location import join
from trainer.data.build.build import build
from trainer.data.build.prepare import OPTIONAL_CHECKS
from trainer.data.build.progress import progress
from trainer.data.build.shards import write_shards
from trainer.data.build.verify import verify
from trainer.data.drawn.synth import draw_many
from trainer.data.manifest import Manifest

NAME = "catdata"

_OVERVIEW = """\
Make a data set for training from pictures, and check it. A data set is a folder of WebDataset shards with a manifest.

commands:
  synth   draw cats: a data set from nothing
  build   from folders, zips and tars of pictures, here or in a bucket
  verify  read a whole data set and compare it with its manifest

`catdata COMMAND --help` shows the options. Examples:
  catdata synth out/drawn --num 4096 --size 64
  catdata build ~/Downloads/cats.zip out/cats --size 64
  catdata verify out/cats
"""

_SYNTH = """\
Draw cats: OUT gets --num procedural cat faces, each different, with its attributes in the sample's JSON. The same
--num, --size and --seed give the same bytes.

example:
  catdata synth out/drawn --num 4096 --size 64 --seed 0
"""

_BUILD = """\
Make the data set OUT from pictures. SRC is a folder (with all folders inside), a zip, a tar (.gz, .bz2, .xz too), a
data set made before, or a picture; several are put together. All formats and colour modes become RGB: the EXIF
orientation is applied, transparency laid on white, 16 bits brought to 8, of an animation the first frame taken.

Every picture looked at is kept, or listed in OUT/rejected.csv with the reason, and a score where a number decided;
OUT/contact.png and OUT/rejected.png show some of both. Rejected is what is not readable, not a picture, too small, too
large (more than 89 million pixels), a duplicate of an earlier one pixel by pixel, and, unless --keep says otherwise,
what is a banner, dark, flat or blurred, or nearly the same as a larger one. Not looked at are hidden files and notes
beside pictures (.json, .txt, .csv, .tsv, .md, .xml, .yaml, .yml, .cls).

Which pictures are for validation, and the order of all, follows from --seed, --size and the pixels: the same pictures
give the same split, however they are packed. While it works, encoded pictures take their room on disk twice.

When it is stopped, by Ctrl-C, a crash or the network, the same command goes on where it was.

SRC and OUT may be in a bucket (s3://, gs://, az://), SRC also on a web server: an archive, a picture or a data set.
Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). A data set for a
bucket is made in the cache folder (CATGAN_CACHE, ~/.cache/catgan) and then uploaded, its manifest last.

examples:
  catdata build ~/Downloads/cats.zip out/cats --size 64
  catdata build photos/ more.tar.gz out/cats --size 128 --min-size 128 --val-fraction 0.05
  catdata build faces/ out/faces --size 64 --crop none
  catdata build photos/ out/faces --size 64 --crop face --faces all
  catdata build photos/ out/cats --dry-run
  catdata build photos/ out/cats --keep blurred,near-duplicate
  catdata build breeds/ out/breeds --labels folder
  catdata build photos/ out/breeds --labels breeds.csv
  catdata build s3://bucket/photos https://example.org/cats.zip s3://bucket/cats64 --size 64
"""

_VERIFY = """\
Read the whole data set DIR: SHA-256 of each shard, the number of pictures, and that each sample is an RGB picture of
the right size with its JSON. The first thing that is wrong is named, with exit status 2.

example:
  catdata verify out/cats
"""


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--size",
        type=number(int, 8, 1024),
        default=64,
        metavar="PX",
        help="pictures in OUT are PX x PX pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        metavar="N",
        help="chance: what is drawn, the order, which pictures are for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=number(float, 0, 0.5),
        default=0.1,
        metavar="X",
        help="share of the pictures kept for validation, 0 to 0.5; at least one unless 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=number(int, 1, 1024),
        metavar="N",
        help="processes to work with (default: one for each core)",
    )


def _synth(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} synth", _SYNTH)
    parser.usage = f"{parser.prog} OUT [options]"
    parser.add_argument("out", metavar="OUT", help="folder to make; must not exist, or be empty")
    parser.add_argument(
        "--num", type=number(int, 1, 10**8), default=4096, metavar="N", help="pictures (default: %(default)s)"
    )
    _add_common(parser)
    a = parser.parse_args(argv)
    manifest = write_shards(
        a.out,
        progress(draw_many(a.seed, a.num, a.size, a.processes), "draw", "picture", a.num),
        size=a.size,
        seed=a.seed,
        val_fraction=a.val_fraction,
        source=["drawn cats"],
        options={"num": a.num, "val_fraction": a.val_fraction},
    )
    kept, shards = _totals(manifest)
    return _summary(a.out, kept, 0, shards)


def _build(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} build", _BUILD)
    parser.usage = f"{parser.prog} SRC... OUT [options]"
    parser.add_argument("paths", nargs="+", metavar="SRC... OUT", help="sources, then the folder to make")
    _add_common(parser)
    parser.add_argument(
        "--crop",
        choices=("center", "none", "face"),
        default="center",
        help="center: cut out the largest square in the middle; none: reject what is not square; face: cut out the "
        "face of a cat, reject what shows none (default: %(default)s)",
    )
    parser.add_argument(
        "--faces",
        choices=("best", "all"),
        help="with --crop face: the best face of each picture, or each as a picture of its own (default: best)",
    )
    parser.add_argument(
        "--keep",
        type=_kinds,
        default=(),
        metavar="KIND[,KIND]",
        help=f"do not reject for these reasons: {', '.join(OPTIONAL_CHECKS)}",
    )
    parser.add_argument(
        "--labels",
        metavar="folder|CSV",
        help="give each picture a class: the name of the folder it lies in, or by a CSV file with the header "
        "file,label, where a file is named as in rejected.csv or by the end of that; pictures without are rejected",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count what would be kept; OUT is not touched")
    parser.add_argument(
        "--min-size",
        type=number(int, 1, 65535),
        metavar="PX",
        help="reject pictures with a shorter side below this (default: half of --size; enlarged pictures are blurred)",
    )
    # parse_args would take OUT from the first run of paths and refuse those after an option.
    a = parser.parse_intermixed_args(argv)
    if len(a.paths) < 2:
        parser.error(f"only one path is given, {a.paths[0]}: name the pictures and then the folder to make")
    if a.faces and a.crop != "face":
        parser.error(f"--faces {a.faces} chooses among the faces that --crop face finds: give that, too")
    *paths, out = a.paths
    _, report = build(
        paths,
        out,
        size=a.size,
        crop=a.crop,
        faces=a.faces or "best",
        keep=a.keep,
        labels=a.labels,
        val_fraction=a.val_fraction,
        seed=a.seed,
        min_size=a.min_size,
        processes=a.processes,
        dry_run=a.dry_run,
    )
    if report.rejected:
        where = "" if a.dry_run else f"; one by one in {join(out, 'rejected.csv')}"
        say(f"rejected: {report}{where}")
    if report.enlarged:
        say(f"enlarged: {report.enlarged} pictures smaller than {a.size} pixels; --min-size {a.size} rejects them")
    summary = _summary(out, report.kept, report.rejected.total(), report.shards)
    return {**summary, "reasons": dict(report.rejected.most_common()), "resumed": report.resumed}


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in OPTIONAL_CHECKS:
            raise argparse.ArgumentTypeError(f"{kind!r} is given, allowed are {', '.join(OPTIONAL_CHECKS)}")
    return kinds


def _summary(out: str, kept: int, rejected: int, shards: int) -> dict[str, Any]:
    return {"out": out, "read": kept + rejected, "kept": kept, "rejected": rejected, "shards": shards}


def _totals(manifest: Manifest) -> tuple[int, int]:
    splits = manifest.splits.values()
    return sum(split.images for split in splits), sum(len(split.shards) for split in splits)


def _verify(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} verify", _VERIFY)
    parser.add_argument("location", metavar="DIR", help="folder of the data set")
    manifest = verify(parser.parse_args(argv).location)
    images, shards = _totals(manifest)
    return {"ok": True, "images": images, "shards": shards, "digest": manifest.digest}


_COMMANDS = {"synth": _synth, "build": _build, "verify": _verify}


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catdata`` with these arguments. Returns the JSON object of the command."""
    return dispatch(NAME, _OVERVIEW, _COMMANDS, argv)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
