"""``cattrain``: commands for the folder of a training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import Parser, UserError, dispatch, number, run_command
from catgan.location import local_path

if TYPE_CHECKING:
    from trainer.checkpoints.storage import Storage

NAME = "cattrain"

_OVERVIEW = """\
Commands for the folder of a training, out/runs/NAME. `python trainer/run.py` trains.

commands:
  project  find the latents whose images are nearest to photos
  report   write one HTML file with curves, sample grids, metrics and settings; several runs: compare them
  sync     deliver the records that are not in MLflow yet

`cattrain COMMAND --help` shows the options. Examples:
  cattrain report out/runs/mine
  cattrain sync out/runs/mine
  cattrain project out/runs/mine photo.jpg
"""

_SYNC = """\
Deliver the records of a training to MLflow: params, metrics, notes and the final status, then grids, the model and
other files. A training queues them in RUN_DIR/outbox.jsonl, with --track.offline or while the server is unreachable or
refuses a file. The command can be interrupted and run again at any time: no record is delivered twice.

They go to the server that the training was started with, or to --uri. User and password are not recorded: set
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. RUN_DIR may be a complete copy from another machine.

examples:
  cattrain sync out/runs/mine
  cattrain sync copied/mine --uri http://gpu0:5000

Progress goes to stderr, one line of JSON to stdout: run_dir, mlflow_run_id, delivered (records). --debug shows
tracebacks.
"""


_REPORT = """\
Write a report of a training as one HTML file: curves, sample grids over time, evaluations with the best one marked,
differences from the recipe, the data, warnings, how to use the result. The file needs no server, network or other file,
so it can be mailed. A training writes it when it ends, as RUN_DIR/report.html; this command writes it while a training
runs, or after it was interrupted.

Two to twelve runs are compared on one page: their grids at the same kimg under one slider, their curves over each
other, the options that differ, best values and cost. It is compare.html in the current folder, unless --out is given.

examples:
  cattrain report out/runs/mine
  cattrain report out/runs/mine -o mine.html
  cattrain report out/runs/mine out/runs/other
  cattrain report out/runs/mine --neighbours      does the generator copy its training images?

One line of JSON goes to stdout: report, run_dir; of a comparison report, run_dirs. --debug shows tracebacks.
"""


def _report(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} report", _REPORT)
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="folder of a run, or its URL in a bucket; several to compare"
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=local_path,
        help="the file to write (default: report.html in RUN_DIR; of a comparison, compare.html in the current folder)",
    )
    parser.add_argument(
        "--neighbours",
        action="store_true",
        help="of one run: show the training images nearest to generated ones, and how near held-out images are; reads "
        "the whole data set, and puts some of its images into the file",
    )
    args = parser.parse_args(argv)
    if len(args.run_dirs) > 1:
        if args.neighbours:
            raise UserError("--neighbours is for one run: leave it out, or give one RUN_DIR")
        return _compare(args.run_dirs, args.out)
    (run_dir,) = args.run_dirs

    from trainer.report.page import NAME as REPORT
    from trainer.report.page import write_report

    with _opened(run_dir, [REPORT]) as (storage, folder):
        write_report(folder, args.out, neighbours=args.neighbours)
    return {"report": str(args.out or storage.join(REPORT)), "run_dir": run_dir}


def _compare(run_dirs: Sequence[str], out: Path | None) -> dict[str, Any]:
    from trainer.checkpoints.storage import open_storage
    from trainer.report.compare import MAX_RUNS, NEEDED, write_comparison
    from trainer.report.compare import NAME as COMPARISON

    if len(run_dirs) > MAX_RUNS:
        raise UserError(f"{len(run_dirs)} runs: a comparison takes at most {MAX_RUNS}")
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for location in run_dirs:
            storage = open_storage(location)
            try:
                runs.append((storage.location, storage.copy(NEEDED, Path(scratch))))
            except OSError as error:
                raise UserError(f"{location}: {error.strerror or error}") from error
        path = write_comparison(runs, out or Path(COMPARISON))
    return {"report": str(path), "run_dirs": run_dirs}


def _sync(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} sync", _SYNC)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, or its URL in a bucket")
    parser.add_argument(
        "--uri", metavar="URI", help="MLflow tracking URI (default: the one that the training was started with)"
    )
    args = parser.parse_args(argv)

    from export.registry import register
    from trainer.tracking.outbox import POSITIONS
    from trainer.tracking.tracker import sync

    with _opened(args.run_dir, POSITIONS) as (_, folder):
        return sync(folder, args.uri, register=register) | {"run_dir": args.run_dir}


_PROJECT = """\
Find the latent whose image is nearest to a photo, by gradient descent through the generator. Two photos' latents can be
blended, moved along directions and made into a film with catinfer. The photo is cropped and resized as by
`catdata build`; choose the crop that the training data were made with. A generator only makes images like its training
data: of another cat it shows one that resembles it.

For photo.jpg you get photo.latent.npz and photo.projected.png, the photo and the result side by side.

examples:
  cattrain project out/runs/mine photo.jpg
  cattrain project out/runs/mine *.jpg --crop face --film webp --out latents/
  catinfer --onnx out/runs/mine --latent a.latent.npz --latent b.latent.npz --interpolate walk.gif

Progress goes to stderr, one line of JSON to stdout: run, weights_sha256, photos, seconds. --debug shows tracebacks.
"""


def _project(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} project", _PROJECT)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a run (its best generator), a checkpoint, a gen.safetensors, or the URL of a run in a bucket",
    )
    parser.add_argument("photos", metavar="PHOTO", nargs="+", type=local_path, help="image file")
    parser.add_argument("--out", metavar="DIR", type=local_path, default=Path(), help="folder (default: this one)")
    parser.add_argument(
        "--crop", choices=("center", "face", "none"), default="center", help="as of catdata build (default center)"
    )
    parser.add_argument(
        "--starts", type=number(int, 1, 64), default=4, metavar="N", help="searches at once (default 4)"
    )
    parser.add_argument(
        "--steps", type=number(int, 1, 100_000), default=300, metavar="N", help="of each search (default 300)"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        metavar="S",
        help="the starts are the nearest of 512 seeds from this one on (default 0)",
    )
    parser.add_argument("--film", choices=("gif", "webp"), help="also write a film of the search, photo.search.gif")
    args = parser.parse_intermixed_args(argv)
    began = time.perf_counter()

    from export.generator import weights_sha256
    from export.source import is_in_mlflow, open_source
    from trainer.project.command import Order, project

    if is_in_mlflow(args.run):
        raise UserError(f"{args.run}: a generator in MLflow; give the folder of its run")
    generator = open_source(args.run, None).generator
    digest = weights_sha256(generator)
    photos = [str(photo) for photo in args.photos]
    order = Order(photos, args.out, args.crop, args.starts, args.steps, args.seed, args.film)
    results = project(generator, digest, order)
    seconds = round(time.perf_counter() - began, 3)
    return {"run": args.run, "weights_sha256": digest, "photos": results, "seconds": seconds}


@contextmanager
def _opened(location: str, written: Sequence[str]) -> Iterator[tuple[Storage, Path]]:
    """The run at ``location`` and its folder on this machine: of a run in a bucket a temporary copy, from which the
    files ``written`` are uploaded at the end if they have changed. A training may be writing the run meanwhile."""
    from trainer.checkpoints.storage import Bucket, open_storage
    from trainer.report.history import FILES

    storage = open_storage(location)
    try:
        if isinstance(storage, Bucket) and not storage.has_any(FILES):  # a folder of runs: all would be downloaded
            raise UserError(f"{location} is not a run: it has none of {', '.join(FILES)}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = storage.copy([""], Path(scratch))
            before = {name: _content(folder / name) for name in written}
            try:
                yield storage, folder
            finally:
                for name in written:
                    if _content(folder / name) != before[name]:
                        storage.publish(folder, name)
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from error


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


_COMMANDS = {"project": _project, "report": _report, "sync": _sync}


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``cattrain`` with these arguments. Returns the JSON object of the command."""
    return dispatch(NAME, _OVERVIEW, _COMMANDS, argv)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
