"""The order of a race's trainings, and what is left of them after a race that was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from race_judge import Judge
from race_report import load_trainings, mean_row, write_results

import trainer
from catgan.command import UserError, say


@dataclass(frozen=True)
class Entrant:
    """Who takes part."""

    name: str
    identity: Any
    """Its configuration as JSON; a finished training with another one does not count."""
    run: Callable[[int, str], dict[str, Any]]
    """``run(seed, label)`` trains it and returns what ``race_training.train`` does."""


class Race:
    """All trainings of some entrants with some seeds under the same conditions, the finished ones kept in ``out``.

    Args:
        header: how it is measured and on what, as it is printed: metric, split, n_real, minutes, size, seeds,
            dataset_digest, machine.
        intervals, num: further conditions under which a finished training counts.
    """

    def __init__(
        self, entrants: Sequence[Entrant], header: dict[str, Any], intervals: int, num: int, out: Path
    ) -> None:
        self.entrants, self.header, self.intervals, self.out = entrants, header, intervals, out
        self.trainings = load_trainings(out)
        conditions = {key: header[key] for key in ("metric", "split", "minutes", "size", "dataset_digest", "machine")}
        self.conditions = {**conditions, "intervals": intervals, "num": num, "code": code_digest()}

    def order(self) -> list[tuple[Entrant, int]]:
        """Every training: the entrants in turn with seed 0, backwards with seed 1, forwards again with seed 2, ..."""
        return [
            (entrant, seed)
            for seed in range(self.header["seeds"])
            for entrant in (self.entrants if seed % 2 == 0 else reversed(self.entrants))
        ]

    def run(self, judge: Judge) -> list[str]:
        """Train what is not finished yet. Returns what went wrong; an entrant that fails is out, the others go on."""
        todo = [(entrant, seed) for entrant, seed in self.order() if self._find(entrant, seed) is None]
        total = len(self.entrants) * self.header["seeds"]
        if done := total - len(todo):
            say(f"{done} of {total} trainings are finished already, as {self.out} says")
        if todo:
            judge.prepare()
        failures: dict[str, str] = {}
        for i, (entrant, seed) in enumerate(todo):
            if entrant.name in failures:
                continue
            label = f"{entrant.name} seed {seed}"
            left = _duration(self._seconds(sum(e.name not in failures for e, _ in todo[i:]), judge))
            say(f"next: {label} ({done + i + 1} of {total}); about {left} left{'' if i else ', and evaluations'}")
            try:
                result = entrant.run(seed, label)
            except UserError as error:
                failures[entrant.name] = str(error)
                say(f"{label} failed, so {entrant.name} is out; the others go on")
                continue
            self.trainings.append({"settings": self._settings(entrant, seed), **result})
            write_results(self.out, self.record(), self.trainings)
        return list(failures.values())

    def by_name(self) -> dict[str, list[dict[str, Any]]]:
        """The finished trainings of each entrant that has any, in the order of the seeds."""
        found = {e.name: [self._find(e, seed) for seed in range(self.header["seeds"])] for e in self.entrants}
        finished = {name: [t for t in trainings if t is not None] for name, trainings in found.items()}
        return {name: trainings for name, trainings in finished.items() if trainings}

    def record(self) -> dict[str, Any]:
        """The object that is printed: the header, and a row for each entrant with a finished training."""
        rows = [mean_row(name, trainings) for name, trainings in self.by_name().items()]
        header = {key: value for key, value in self.header.items() if key != "machine"}
        return {**header, "results": rows, "machine": self.header["machine"], "out": str(self.out)}

    def _settings(self, entrant: Entrant, seed: int) -> dict[str, Any]:
        """As JSON holds it, where tuples are lists."""
        settings = {"recipe": entrant.name, "seed": seed, **self.conditions, "config": entrant.identity}
        return json.loads(json.dumps(settings))

    def _find(self, entrant: Entrant, seed: int) -> dict[str, Any] | None:
        settings = self._settings(entrant, seed)
        return next((training for training in self.trainings if training["settings"] == settings), None)

    def _seconds(self, trainings: int, judge: Judge) -> float:
        """How long so many trainings take, with evaluations as long as those so far (average and live weights)."""
        evaluation = judge.seconds / judge.evaluations if judge.evaluations else 0.0
        return trainings * (self.header["minutes"] * 60 + 2 * self.intervals * evaluation)


def code_digest() -> str:
    """SHA-256 (hex, its start) of what trains: results of another version of it do not count."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(Path(trainer.__path__[0]).rglob("*.py")), here / "race_training.py", here / "plain_dcgan.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
