"""What a sweep is going to do, checked before anything starts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.config import Config
from trainer.launch.checks import check_options, problems_of_name
from trainer.launch.classes import with_classes
from trainer.launch.options import Options, parse, texts
from trainer.launch.start import init_weights
from trainer.loop import plan as plan_steps
from trainer.sweeps.options import SweepOptions
from trainer.sweeps.sampler import check_tpe
from trainer.sweeps.space import Dimension, Value, corners, draw, grid, num_combinations, parse_space, words
from trainer.sweeps.state import Rungs

DEFAULT_TRIALS = 8
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Plan:
    """A sweep whose options are valid."""

    sweep: SweepOptions
    recipe: Config
    manifest: Manifest | None
    base: Options
    """The options of all trials, without the values that are tried."""
    words: tuple[str, ...]
    """The same as a command line."""
    dimensions: list[Dimension]
    num_trials: int
    rungs: Rungs | None
    """Where trials are stopped; None: nowhere."""

    @property
    def fields(self) -> list[str]:
        return [dimension.field for dimension in self.dimensions]

    def listed(self) -> list[dict[str, Value]] | None:
        """The values of all trials in their order; None with tpe, whose values depend on earlier trials."""
        if self.sweep.algorithm == "grid":
            return grid(self.dimensions)
        if self.sweep.algorithm == "tpe":
            return None
        return draw(self.dimensions, self.num_trials, self.base.seed)

    def options(self, chosen: Mapping[str, Value], seed: int) -> Options:
        """The options of a trial.

        Raises:
            UserError: its values are not valid, alone or together.
        """
        given = " ".join(f"{field}={value}" for field, value in chosen.items())
        try:
            options = replace(parse([*self.words, *words(chosen, self.recipe)], self.recipe, ""), seed=seed)
            options = with_classes(options, self.manifest)
            check_options(options, self.manifest, self.sweep.workers)
        except UserError as error:
            check_options(with_classes(self.base, self.manifest), self.manifest, self.sweep.workers)  # not the trial's
            raise UserError(f"--try {given}: {error}") from None
        return options

    def most_kimg(self) -> float:
        """The cost if no trial were stopped, with the repetitions."""
        best, seeds = self.sweep.confirm
        return self.base.kimg * (self.num_trials + min(best, self.num_trials) * seeds)

    def command(self, chosen: Mapping[str, Value], seed: int, out: str, name: str, kimg: float, uri: str | None) -> str:
        """The command line that continues a trial to ``kimg``."""
        line = ["python", "trainer/run.py", self.base.recipe, *_without("--kimg", self.sweep.words)]
        line += words(chosen, self.recipe)
        line += ["--seed", str(seed)] if seed != self.base.seed else []
        line += ["--kimg", f"{kimg:g}", "--out", out, "--name", name]
        return shlex.join([*line, "--track.uri", uri] if uri else line)


def snapshot_kimg(options: Options) -> float:
    """Kimg between two snapshots of a training: a whole number of steps, unlike ``--track.snapshot-kimg``."""
    return plan_steps(options.config())[1] * options.batch / 1000


def positions(options: Options, rungs: Rungs) -> dict[float, float]:
    """Kimg of the evaluations at which a training may be stopped, by rung: the first one that reaches it."""
    every, length = options.eval.every, snapshot_kimg(options)
    decided: dict[float, float] = {}
    for i in range(1, math.ceil(rungs.last / length)):
        rung = rungs.reached(i * length, length)
        if rung is not None and (i == 1 or i % every == 0) and rung > max(decided, default=0.0):
            decided[rung] = i * length
    return decided


def _without(option: str, given: Sequence[str]) -> list[str]:
    """A command line without an option and its value."""
    pairs = zip(given, ["", *given], strict=False)
    return [word for word, before in pairs if option not in (word, before) and not word.startswith(f"{option}=")]


def make_plan(sweep: SweepOptions, recipe: Config, manifest: Manifest | None) -> Plan:
    """Check the options of a sweep and of all its trials.

    Raises:
        UserError: one of them cannot be used.
    """
    if found := problems_of_name(sweep.name):
        raise UserError("; ".join(found))
    if sweep.algorithm == "tpe":
        check_tpe()
    dimensions = parse_space(sweep.tries, recipe)
    base = parse(list(sweep.words), recipe, "")
    given, rungs = list(sweep.words), None
    if not 0 < base.kimg < math.inf:
        raise UserError(f"--kimg {base.kimg:g}: give more than 0")
    if sweep.reduction:
        first = sweep.first_rung or base.kimg / sweep.reduction**2
        if first > base.kimg:
            raise UserError(f"--first-rung {first:g}: give at most --kimg, {base.kimg:g}")
        rungs = Rungs(first, sweep.reduction, base.kimg)
        given = _with_evaluations(given, base, recipe, first)
    if sweep.algorithm == "grid":
        num_trials = len(grid(dimensions))
    else:
        num_trials = sweep.trials or int(min(DEFAULT_TRIALS, num_combinations(dimensions)))
        draw(dimensions, num_trials, base.seed)  # as many exist
    plan = Plan(sweep, recipe, manifest, parse(given, recipe, ""), tuple(given), dimensions, num_trials, rungs)
    if plan.base.seed + sweep.confirm[1] > _MAX_SEED:
        raise UserError(f"--seed {plan.base.seed}: give a smaller one, since --confirm counts up from it")
    _check_trials(plan)
    return plan


def _with_evaluations(given: list[str], base: Options, recipe: Config, first: float) -> list[str]:
    """The options, such that there is an evaluation at each rung unless the user has chosen otherwise."""
    track = base.track
    if track.snapshot_kimg != recipe.track.snapshot_kimg or track.snapshot_kimg <= first:
        return given
    tick = first / math.ceil(first / track.tick_kimg)  # a snapshot is a whole number of ticks
    return ["--track.snapshot-kimg", f"{first:.6g}", "--track.tick-kimg", f"{tick:.6g}", *given]


def _check_trials(plan: Plan) -> None:
    """All trials that are known, else the limits of all spaces, have to be valid, and to have the same metric."""
    networks = set()
    kinds: list[tuple[object, ...]] = []  # of networks: each has to fit the weights to start from
    for chosen in plan.listed() or list(corners(plan.dimensions)):
        options = plan.options(chosen, plan.base.seed)
        # With another discriminator `auto` takes another network.
        networks.add(options.eval.extractor == "auto" and options.projected.weight > 0)
        kind = (options.model, options.projected, options.optim.freeze_d)
        if kind not in kinds:
            init_weights(options)
            kinds.append(kind)
    if len(networks) > 1:
        raise UserError(
            "--try projected.weight with 0 and others: their metrics would be of different networks; give"
            " --eval.extractor opennsfw or inception for all of them"
        )


def settings(plan: Plan) -> dict[str, str]:
    """What a continued sweep must have as before, see ``Ledger``."""
    return texts(plan.base.config()) | {
        "recipe": plan.base.recipe,
        "--data": plan.base.data or "",
        "--try": " ".join(map(str, plan.dimensions)),
        "--algorithm": plan.sweep.algorithm,
        "--reduction": f"{plan.sweep.reduction:g}",
        "--first-rung": f"{plan.rungs.first:g}" if plan.rungs else "",
    }
