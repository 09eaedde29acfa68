"""``cattrain``: commands for the folder of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catgan.command import Parser, UserError, dispatch, run_command
from catgan.location import local_path

if TYPE_CHECKING:
    from trainer.checkpoints.storage import Storage

NAME = "cattrain"

_OVERVIEW = """\
Commands for the folder of a training, out/runs/NAME. `python trainer/run.py` trains.

commands:
  report   write one HTML file with curves, sample grids, metrics and settings
  sync     deliver the records that are not in MLflow yet

`cattrain COMMAND --help` shows the options. Examples:
  cattrain report out/runs/mine
  cattrain sync out/runs/mine
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

examples:
  cattrain report out/runs/mine
  cattrain report out/runs/mine -o mine.html

One line of JSON goes to stdout: report, run_dir. --debug shows tracebacks.
"""


def _report(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} report", _REPORT)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, or its URL in a bucket")
    parser.add_argument(
        "-o", "--out", metavar="FILE", type=local_path, help="the file to write (default: report.html in RUN_DIR)"
    )
    args = parser.parse_args(argv)

    from trainer.report.page import NAME as REPORT
    from trainer.report.page import write_report

    with _work(args.run_dir) as (storage, folder):
        write_report(folder, args.out)
    return {"report": str(args.out or storage.join(REPORT)), "run_dir": args.run_dir}


def _sync(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"{NAME} sync", _SYNC)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, or its URL in a bucket")
    parser.add_argument(
        "--uri", metavar="URI", help="MLflow tracking URI (default: the one that the training was started with)"
    )
    args = parser.parse_args(argv)

    from export.registry import register
    from trainer.tracking.tracker import sync

    with _work(args.run_dir) as (_, folder):
        return sync(folder, args.uri, register=register) | {"run_dir": args.run_dir}


@contextmanager
def _work(location: str) -> Iterator[tuple[Storage, Path]]:
    """The run at ``location`` and its folder on this machine: of a run in a bucket, a copy that is pushed back."""
    from trainer.checkpoints.storage import open_storage

    storage = open_storage(location)
    try:
        storage.pull()
        yield storage, storage.work
        storage.push()
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from error


_COMMANDS = {"report": _report, "sync": _sync}


def main(argv: list[str]) -> dict[str, Any]:
    """Run ``cattrain`` with these arguments. Returns the JSON object of the command."""
    return dispatch(NAME, _OVERVIEW, _COMMANDS, argv)


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
