"""Which values the next trial gets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from catgan.command import UserError
from trainer.sweeps.space import Choice, Dimension, Value, draw
from trainer.sweeps.state import Trial

_ATTEMPTS = 16  # until a proposal differs from all trials


def check_tpe() -> None:
    """Raise UserError if optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "--algorithm tpe needs the package optuna: pip install optuna (the extra `sweep`), or --algorithm random"
        ) from None


class Tree:
    """The tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011) of
    optuna. A trial that was stopped ranks behind those that came further, as optuna does for pruned ones."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        import optuna

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self._dimensions = dimensions
        self._seed = seed
        self._distributions: dict[str, Any] = {}
        for one in dimensions:
            if isinstance(one, Choice):
                self._distributions[one.field] = optuna.distributions.CategoricalDistribution(one.options)
            elif one.is_whole:
                self._distributions[one.field] = optuna.distributions.IntDistribution(
                    int(one.low), int(one.high), log=one.is_log
                )
            else:
                self._distributions[one.field] = optuna.distributions.FloatDistribution(
                    one.low, one.high, log=one.is_log
                )

    def propose(self, trials: Mapping[str, Trial]) -> dict[str, Value]:
        """Values for the next trial, given all others; the same for the same ones, and none that was proposed before.
        If the estimator does not come up with any, random ones.

        Raises:
            UserError: there are no others.
        """
        import optuna

        searched = [trial for trial in trials.values() if trial.of is None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=self._seed * 10_007 + len(searched), constant_liar=True)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        states = optuna.trial.TrialState
        for trial in searched:
            state = {"done": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}.get(trial.status)
            last = trial.last
            if state == states.COMPLETE and last is None:
                state = states.FAIL
            study.add_trial(
                optuna.trial.create_trial(
                    state=state or states.RUNNING,
                    params={field: self._own(field, value) for field, value in trial.values.items()},
                    distributions=self._distributions,
                    value=last.value if state == states.COMPLETE and last else None,
                    intermediate_values={round(1000 * kimg): point.value for kimg, point in trial.points.items()},
                )
            )
        tried = [trial.values for trial in searched]
        for _ in range(_ATTEMPTS):
            params = study.ask(self._distributions).params  # counts as running, so that the next one keeps away from it
            values = {
                one.field: str(params[one.field]) if isinstance(one, Choice) else one.text(params[one.field])
                for one in self._dimensions
            }
            if values not in tried:
                return values
        # Of so many different ones, one at least is not among the trials.
        drawn = draw(self._dimensions, len(tried) + 1, self._seed)
        return next(values for values in drawn if values not in tried)

    def _own(self, field: str, value: Value) -> Any:
        """A value as optuna has it."""
        one = next(dimension for dimension in self._dimensions if dimension.field == field)
        return value if isinstance(one, Choice) else int(value) if one.is_whole else float(value)
