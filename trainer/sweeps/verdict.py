"""Which configuration is best, and by more than noise?

The best of many trials with one seed each is selected for its luck, too, and a repetition is usually worse. So the best
few are trained with new seeds, and compared by these alone; the trials that selected them do not count. The noise of a
mean over n seeds has two parts: the spread between seeds, estimated from all repeated configurations together, since
two or three seeds of one tell little, and the standard error of the metric itself. The spread contains the latter
already, which is counted twice: rather "no difference shown" than a difference that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.sweeps.state import Trial

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond the last one 1.96 + 2.5 / degrees.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Repeated:
    """A configuration that was repeated with new seeds."""

    trial: str
    """The trial that tried it first."""
    distances: tuple[float, ...]
    """One for each new seed."""
    mean: float
    error: float
    """Standard error of the mean: between seeds, if any configuration has two, and of the metric."""


@dataclass(frozen=True)
class Verdict:
    """The best configuration and how sure that is."""

    best: str
    """The trial."""
    distance: float
    error: float | None
    is_more_than_noise: bool | None
    """Whether it is better than each other repeated configuration by more than noise; None: there is nothing to compare
    it with."""
    text: str
    repeated: tuple[Repeated, ...] = ()
    """The best first."""


def rank(trials: Mapping[str, Trial]) -> list[Trial]:
    """The trials of the search, the best first: those that were trained to the end by their distance there, then those
    that came furthest."""
    measured = [trial for trial in trials.values() if trial.of is None and trial.last is not None]

    def key(trial: Trial) -> tuple[float, float]:
        # Batches of other sizes end at slightly different kimg.
        return -math.inf if trial.status == "done" else -trial.kimg, trial.last.value if trial.last else math.inf

    return sorted(measured, key=key)


def repeated(trials: Mapping[str, Trial]) -> list[Repeated]:
    """All configurations with a new seed or more that are done, the best first.

    One seed of a configuration has no spread of its own, but the pooled one of the others applies to it. If none has
    two seeds, the errors are those of the metric alone, and ``decide`` compares nothing.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials.values():
        if trial.of is not None and trial.status == "done" and trial.last is not None:
            groups.setdefault(trial.of, []).append(trial)
    values = {of: [t.last.value for t in group if t.last] for of, group in groups.items()}
    degrees = _degrees(values.values())
    spread = sum(sum((v - _mean(group)) ** 2 for v in group) for group in values.values()) / max(degrees, 1)
    found = []
    for of, group in groups.items():
        own = _mean([trial.error**2 for trial in group])
        error = math.sqrt((spread + own) / len(group))
        found.append(Repeated(of, tuple(values[of]), _mean(values[of]), error))
    return sorted(found, key=lambda one: one.mean)


def decide(trials: Mapping[str, Trial]) -> Verdict | None:
    """The verdict so far; None without any distance."""
    ranked = rank(trials)
    if not ranked:
        return None
    again = repeated(trials)
    if not again:
        best = ranked[0]
        assert best.last is not None
        text = "one seed each: the best of them may just be the luckiest; --confirm 3x2 repeats the best with new seeds"
        return Verdict(best.name, best.last.value, best.last.error, None, text)
    best_one, others = again[0], again[1:]
    num = len(best_one.distances)
    degrees = _degrees([one.distances for one in again])
    if not others or not degrees:
        why = "there is no other repeated configuration to compare it with"
        if others:
            why = "one seed each shows no spread between seeds, so that nothing can be compared"
        text = f"mean of {num} new seed{'s' if num > 1 else ''}; {why}"
        return Verdict(best_one.trial, best_one.mean, best_one.error if degrees else None, None, text, tuple(again))
    close = []
    for other in others:
        noise = _quantile(degrees) * math.hypot(best_one.error, other.error)
        if other.mean - best_one.mean <= noise:
            close.append(f"{other.trial} (worse by {other.mean - best_one.mean:.2f} +- {noise:.2f})")
    if close:
        text = f"no difference shown between {best_one.trial} and {', '.join(close)}, means over new seeds"
    else:
        text = (
            f"{best_one.trial} is better than {', '.join(o.trial for o in others)} by more than noise, over new seeds"
        )
    return Verdict(best_one.trial, best_one.mean, best_one.error, not close, text, tuple(again))


def _degrees(groups: Iterable[Sequence[float]]) -> int:
    return sum(len(group) - 1 for group in groups)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quantile(degrees: int) -> float:
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees
