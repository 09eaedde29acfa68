"""The command line of ``trainer/sweep.py``: its own options, and those of ``run.py``, which apply to all trials."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from catgan.command import Parser, UserError, number
from trainer.launch.options import split_recipe

ALGORITHMS = ("random", "grid", "tpe")

_HELP = """\
Train many configurations as Ray Tune trials, stop the bad ones early, repeat the best ones with other seeds, and print
the command that trains the best one for longer.

RECIPE and all options of run.py apply to every trial (`run.py --help`), as --data, --kimg (the length of a trial) and
--seed. --try says what differs:

  --try optim.g-lr=1e-4,2e-4,4e-4     one of these values
  --try augment.p=0..0.5              a number in this range
  --try loss.gamma=log:0.02..2        the same, uniform in the logarithm: for rates and weights
  --try loss.share-batch=true,false   flags are fields, too

FIELD is an option of run.py without its dashes. A trial is an ordinary run in OUT/NAME/TRIAL with its own report;
OUT/NAME/sweep.html compares them all. The distance that run.py prints (fid..., fd...: lower is better) is compared at
equal numbers of images.

Interrupted, by Ctrl-C or otherwise? The same command with its --name continues: finished trials are kept, the others
continue from their checkpoints. More --trials may be given then.
"""

_EXAMPLES = """\
examples:
  sweep.py --try optim.g-lr=log:1e-4..1e-3 --trials 8 --kimg 20 --dry-run      print the trials, train nothing
  sweep.py r3gan-64 --data s3://cats/64 --out s3://cats/runs --name rates --try loss.gamma=log:0.02..2 \\
      --try optim.g-lr=1e-4,2e-4,4e-4 --trials 12 --kimg 400 --workers-per-trial 1
  sweep.py --algorithm grid --try batch=16,32 --try ema.half-life-kimg=2,10 --kimg 50 --confirm 0
  ray job submit --working-dir . -- python trainer/sweep.py --out /shared/runs --name rates --try ...

A table goes to stderr; one line of JSON to stdout: best (its values), distance, verdict, command. --debug shows
tracebacks.
"""

_TAKEN = {
    "--workers": "give --workers-per-trial",
    "--resume": "a sweep continues by its --name",
}


@dataclass(frozen=True)
class SweepOptions:
    """What the command line says about the sweep; ``words`` are left for ``run.py``."""

    recipe: str | None
    words: tuple[str, ...]
    tries: tuple[str, ...]
    algorithm: str
    trials: int | None
    confirm: tuple[int, int]
    """How many of the best configurations are repeated, and with how many new seeds each."""
    reduction: float
    """Of the trials that reach a rung, one in this many may go on; 0: all."""
    first_rung: float | None
    workers: int
    gpus: float | None
    """Per trial, as ``cpus``; None: as many as needed."""
    cpus: int | None
    at_once: int | None
    name: str | None
    out: str | None
    dry_run: bool


def parse_sweep(argv: Sequence[str]) -> SweepOptions:
    """Split the command line. ``--help`` prints the help and exits.

    Raises:
        UserError: an unusable value of the sweep's own options. Those of ``run.py`` are not checked here.
    """
    recipe, rest = split_recipe(list(argv))
    parser = _parser()
    own, words = _split(rest, parser)
    args = parser.parse_args(own)
    for word in words:
        if advice := _TAKEN.get(word.partition("=")[0].replace("_", "-")):
            raise UserError(f"{word} is not an option of a sweep: {advice}")
    if args.algorithm == "grid" and args.trials is not None:
        raise UserError("--trials with --algorithm grid, which trains every combination; leave it out")
    if args.reduction and not args.reduction > 1:
        raise UserError(f"--reduction {args.reduction:g}: give 0, or more than 1")
    if args.gpus_per_trial and args.workers_per_trial > 1 and args.gpus_per_trial < args.workers_per_trial:
        raise UserError(
            f"--gpus-per-trial {args.gpus_per_trial:g} with --workers-per-trial {args.workers_per_trial}: workers of"
            " one training cannot share a GPU; give one each, or --workers-per-trial 1"
        )
    return SweepOptions(
        recipe=recipe,
        words=tuple(words),
        tries=tuple(args.tries),
        algorithm=args.algorithm,
        trials=args.trials,
        confirm=_confirm(args.confirm),
        reduction=args.reduction,
        first_rung=args.first_rung,
        workers=args.workers_per_trial,
        gpus=args.gpus_per_trial,
        cpus=args.cpus_per_trial,
        at_once=args.at_once,
        name=args.name,
        out=args.out,
        dry_run=args.dry_run,
    )


def _parser() -> Parser:
    parser = Parser("sweep.py", _HELP, _EXAMPLES)
    parser.usage = "sweep.py [RECIPE] --try FIELD=SPACE [--try ...] [options] [options of run.py]"
    add = parser.add_argument
    add("--try", dest="tries", action="append", default=[], metavar="FIELD=SPACE", help="a field and its values")
    add(
        "--algorithm",
        choices=ALGORITHMS,
        default="random",
        help="random; grid: every combination; tpe: prefer values like those that were good (needs the extra sweep)",
    )
    add("--trials", type=number(int, 1, 1000), metavar="N", help="how many configurations to try (default: 8)")
    add(
        "--confirm",
        default="3x2",
        metavar="NxM",
        help="train the best N configurations with M new seeds each before one is called best; 0: do not. The best of"
        " many trials with one seed each is often just the luckiest (default: 3x2)",
    )
    add(
        "--reduction",
        type=number(float, 0, 1000),
        default=3.0,
        metavar="R",
        help="ASHA: at each rung the best of R trials so far goes on; rungs are at --first-rung kimg and R times the"
        " one before; 0: train all trials to the end (default: 3)",
    )
    add(
        "--first-rung",
        type=number(float, 1e-3, 1e9),
        metavar="KIMG",
        help="no trial is stopped before (default: --kimg divided by the square of --reduction)",
    )
    add(
        "--workers-per-trial", type=number(int, 1, 10_000), default=1, metavar="N", help="training workers (default: 1)"
    )
    add(
        "--gpus-per-trial",
        type=number(float, 0, 10_000),
        metavar="G",
        help="0.5 lets two trials share a GPU (default: one per worker, 0 without GPUs)",
    )
    add(
        "--cpus-per-trial",
        type=number(int, 1, 10_000),
        metavar="C",
        help="for workers and their readers (default: one each; without GPUs an equal share of the machine if that is"
        " more)",
    )
    add(
        "--at-once",
        type=number(int, 1, 10_000),
        metavar="N",
        help="at most so many trials at once (default: all that fit)",
    )
    add("--name", help="name of the sweep; a sweep of this name is continued (default: recipe, time, random digits)")
    add(
        "--out",
        metavar="DIR",
        help="folder or bucket for sweeps and runs (default: out/runs, in a Ray job ~/catgan/runs)",
    )
    add("--dry-run", action="store_true", help="print trials, resources and cost; write nothing, start nothing")
    return parser


def _split(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The words of the options that ``parser`` has, and all others."""
    own, rest = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        action = parser._option_string_actions.get(name.replace("_", "-"))
        if action is None:
            rest.append(word)
            continue
        own.append(name.replace("_", "-") + equals + value)
        if action.nargs != 0 and not equals:
            own += [following for following in [next(words, None)] if following is not None]
    return own, rest


def _confirm(text: str) -> tuple[int, int]:
    if text == "0":
        return 0, 0
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text)
    if match is None:
        raise UserError(f"--confirm {text}: give NxM, the best N with M new seeds each, as 3x2, or 0")
    best, seeds = int(match[1]), int(match[2])
    if best > 1 and seeds < 2:
        raise UserError(f"--confirm {text}: one seed shows no spread between seeds; give 2 or more, as {best}x2, or 0")
    return best, seeds
