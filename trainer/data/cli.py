"""``catdata``: make data sets of images, and verify them.

What takes long to import is imported by the commands, where Ctrl-C is handled.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from catgan.command import Parser, dispatch, number, run_command, say
from catgan.location import is_url, join, local_path
from catgan.outputs import in_words

if TYPE_CHECKING:
    from catgan.dataset import Manifest

NAME = "catdata"

_OVERVIEW = """\
Make data sets for training, and verify them. A data set is a folder of WebDataset shards with a manifest.

commands:
  synth   draw cats: a data set without any source
  build   convert folders, zips and tars of images, local or in a bucket
  verify  compare a data set with its manifest

`catdata COMMAND --help` shows the options. Examples:
  catdata synth out/drawn --num 4096 --size 64
  catdata build ~/Downloads/cats.zip out/cats --size 64
  catdata verify out/cats
"""

_SYNTH = """\
Draw a data set of --num procedural cat faces, all different, with their attributes in the samples' JSON. The same
--num, --size, --seed and --val-fraction give the same bytes.

examples:
  catdata synth out/drawn --num 4096 --size 64 --seed 0
  catdata synth out/coats --num 4096 --size 64 --labels
"""

_BUILD = """\
Make the data set OUT from images. SRC is a folder (including its subfolders), a zip, a tar (also .gz, .bz2, .xz), a
data set or an image; several sources are combined. All formats and colour modes are converted to 8-bit sRGB: colour
profiles and the EXIF orientation are applied, transparent images are composited on white, and of an animation the first
frame is taken. HEIC needs pillow-heif.

Every image is kept, or listed in OUT/rejected.csv with the reason and the measured score, if any. OUT/contact.png and
OUT/rejected.png show samples of both. An image is rejected if it is not readable, not a picture, too small, too
large (more than 89 million pixels), or a duplicate of an earlier image, pixel by pixel; and unless --keep disables the
check, if it is too narrow, dark, flat or blurred, or a near-duplicate of a larger image. Hidden files, metadata files
(.json, .txt, .csv, .tsv, .md, .xml, .yaml, .yml, .cls), and data sets and training runs within a source are ignored.

The validation images and the order of all depend on --seed, --val-fraction and the pixels: the same images give the
same split, however they are packed. During a build, encoded images take twice their space on disk.

A build that is stopped by Ctrl-C, a crash or the network continues when the same command is repeated.

SRC and OUT may be in a bucket (s3://, gs://, az://). SRC may also be an archive, an image or a data set on a web
server. Credentials are read from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). A data
set for a bucket is made in the cache folder (CATGAN_CACHE, ~/.cache/catgan), then uploaded, its manifest last.

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
Read the whole data set DIR and check the SHA-256 of each shard, the number of images, and that each sample is an RGB
image of the right size with its JSON and, in a data set with classes, its class. The first difference is printed, with
exit status 2.

example:
  catdata verify out/cats
"""


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--size",
        type=number(int, 8, 1024),
        default=64,
        metavar="PX",
        help="side of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        metavar="N",
        help="random seed of drawn cats, order and split (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=number(float, 0, 0.5),
        default=0.1,
        metavar="X",
        help="share of the images for validation, 0 to 0.5; at least one image unless 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=number(int, 1, 1024),
        metavar="N",
        help="worker processes (default: one per core)",
    )


def _warn_of(size: int) -> None:
    """Say that no recipe trains on images of ``size`` pixels, which ``catfid`` reads all the same."""
    from trainer.config import SIDES

    if size not in SIDES:
        say(f"warning: --size {size}: recipes train at {', '.join(map(str, SIDES))} pixels only")


def _synth(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} synth", _SYNTH)
    parser.usage = f"{parser.prog} OUT [options]"
    parser.add_argument("out", metavar="OUT", help="new or empty folder for the data set")
    parser.add_argument(
        "--num", type=number(int, 1, 10**8), default=4096, metavar="N", help="number of cats (default: %(default)s)"
    )
    parser.add_argument("--labels", action="store_true", help="give each cat a class: the pattern of its coat")
    _add_common(parser)
    a = parser.parse_args(argv)
    a.out = str(local_path(a.out))
    _warn_of(a.size)

    from trainer.data.build.progress import progress
    from trainer.data.build.shards import write_shards
    from trainer.data.drawn.synth import CLASS, DRAWN_CATS, draw_many

    manifest = write_shards(
        a.out,
        progress(draw_many(a.seed, a.num, a.size, a.processes), "draw", "image", a.num),
        size=a.size,
        seed=a.seed,
        val_fraction=a.val_fraction,
        source=[DRAWN_CATS],
        options={"num": a.num, "val_fraction": a.val_fraction},
        label=CLASS if a.labels else None,
    )
    kept, shards = _totals(manifest)
    return _summary(a.out, kept, 0, shards)


def _build_parser() -> Parser:
    from trainer.data.build.prepare import OPTIONAL_CHECKS

    parser = Parser(f"{NAME} build", _BUILD)
    parser.usage = f"{parser.prog} SRC... OUT [options]"
    parser.add_argument("paths", nargs="+", metavar="SRC... OUT", help="sources, then the folder to make")
    _add_common(parser)
    parser.add_argument(
        "--crop",
        choices=("center", "none", "face"),
        default="center",
        help="center: crop to the largest square in the middle; none: reject images that are not square; face: crop "
        "to the face of a cat, reject images without one (default: %(default)s)",
    )
    parser.add_argument(
        "--faces",
        choices=("best", "all"),
        help="with --crop face: one face per image, or all of them (default: best)",
    )
    parser.add_argument(
        "--keep",
        type=lambda text: _kinds(text, OPTIONAL_CHECKS),
        default=(),
        metavar="KIND[,KIND]",
        help=f"checks to disable: {', '.join(OPTIONAL_CHECKS)}",
    )
    parser.add_argument(
        "--labels",
        metavar="folder|CSV",
        help="give each image a class: the name of its folder, or from a CSV file with the header file,label, which "
        "names files as rejected.csv does, or by the end of such a path; images without a class are rejected; classes "
        "and rows that look wrong are named",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count images that would be kept, write nothing")
    parser.add_argument(
        "--min-size",
        type=number(int, 1, 65535),
        metavar="PX",
        help="reject images with a shorter side below this (default: half of --size; enlarged images are blurred)",
    )
    return parser


def _build(argv: list[str]) -> dict[str, Any]:
    parser = _build_parser()
    # parse_args would refuse paths that follow an option.
    a = parser.parse_intermixed_args(argv)
    if len(a.paths) < 2:
        parser.error(f"only one path is given, {a.paths[0]}: give the sources, then the folder to make")
    if a.faces and a.crop != "face":
        parser.error(f"--faces {a.faces} needs --crop face")
    *paths, out = a.paths
    out = out if is_url(out) else str(local_path(out))
    _warn_of(a.size)

    from trainer.data.build.build import build

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
        where = "" if a.dry_run else f"; each is listed in {join(out, 'rejected.csv')}"
        say(f"rejected: {report}{where}")
    if report.relabelled:
        say(f"labels: {report.relabelled} duplicates have another label than the image that is kept")
    if report.own:
        say(f"skipped, since they are no photos: the files of {in_words(report.own)}")
    if report.enlarged:
        say(f"enlarged: {report.enlarged} images smaller than {a.size} pixels; --min-size {a.size} rejects them")
    if report.ignored_profiles:
        say(f"colour profiles: {report.ignored_profiles} cannot be used; these images keep the colours of their files")
    summary = _summary(out, report.kept, report.rejected.total(), report.shards)
    return {
        **summary,
        "reasons": dict(report.rejected.most_common()),
        "resumed": report.resumed,
        "ignored_profiles": report.ignored_profiles,
    }


def _kinds(text: str, allowed: Collection[str]) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in allowed:
            raise argparse.ArgumentTypeError(f"{kind!r} is given, allowed are {', '.join(allowed)}")
    return kinds


def _summary(out: str, kept: int, rejected: int, shards: int) -> dict[str, Any]:
    return {"out": out, "read": kept + rejected, "kept": kept, "rejected": rejected, "shards": shards}


def _totals(manifest: Manifest) -> tuple[int, int]:
    splits = manifest.splits.values()
    return sum(split.images for split in splits), sum(len(split.shards) for split in splits)


def _verify(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} verify", _VERIFY)
    parser.add_argument("location", metavar="DIR", help="path or URL of the data set")
    location = parser.parse_args(argv).location

    from trainer.data.build.verify import verify

    manifest = verify(location)
    images, shards = _totals(manifest)
    return {"ok": True, "images": images, "shards": shards, "digest": manifest.digest}


_COMMANDS = {"synth": _synth, "build": _build, "verify": _verify}


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``catdata`` with these arguments. Returns the command's JSON object."""
    return dispatch(NAME, _OVERVIEW, _COMMANDS, argv)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
