"""Rates and ratios, on a clock that only the measured work advances."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Protocol

import pytest

from catgan.command import UserError


class Clock(Protocol):
    now: float


def test_rate_counts_whole_units_of_work(measure: ModuleType, clock: Clock) -> None:
    def work() -> int:
        clock.now += 0.5
        return 16

    assert measure.rate(work, 1.8) == pytest.approx(32)
    clock.now = 0.0
    assert measure.rate(work, 1e-9) == pytest.approx(32), "at least one unit is done"


def test_ratios_survive_a_machine_that_slows_down(measure: ModuleType, clock: Clock) -> None:
    """Ours is twice as fast as b and half as fast as c in every round, while all become 10 times slower per round."""
    order: list[str] = []

    def work(name: str, seconds: float) -> int:
        clock.now += seconds * 10 ** (len(order) // 6)  # a round has 6 units of work
        order.append(name)
        return 100

    ways = {"ours": partial(work, "ours", 1.0), "b": partial(work, "b", 2.0), "c": partial(work, "c", 0.5)}
    result = measure.compare("test", ways, seconds=1e-9, repeats=3, settle=1)
    assert order == ["ours", "ours", "b", "b", "c", "c"] * 3
    assert result["images_per_second"] == {"ours": 10.0, "b": 5.0, "c": 20.0}
    assert result["ratios"] == {"b": 2.0, "c": 0.5}
    assert result["ratio"] == 0.5


def test_median_ratio_pairs_rounds(measure: ModuleType) -> None:
    assert measure.median_ratio([10, 100, 2], [5, 50, 1]) == 2
    assert measure.median_ratio([1, 9, 3], [1, 1, 1]) == 3


def test_failed_commands_are_user_errors(measure: ModuleType) -> None:
    out, wall, cpu = measure.run_timed(["-c", "print(7)"], {})
    assert (out, wall > 0, cpu > 0) == ("7\n", True, True)
    with pytest.raises(UserError, match="python -c import no_such_module ended with status 1: ModuleNotFoundError"):
        measure.run_timed(["-c", "import no_such_module"], {})
