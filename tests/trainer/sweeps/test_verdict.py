"""Which configuration is best, by distances with known answers."""

import math

import pytest

from trainer.sweeps.state import Point, Trial
from trainer.sweeps.verdict import decide, rank, repeated


def trials(**distances: float | None) -> dict[str, Trial]:
    """Trials that are done, by name; ``t00_s1`` repeats ``t00``."""
    found = {}
    for key, value in distances.items():
        name = key.replace("_", "-")
        of = name.partition("-")[0] if "-" in name else None
        points = {} if value is None else {10.0: Point(10.0, value, 0.0)}
        found[name] = Trial(name, {"batch": name[1:3]}, 0, of, "done", points=points)
    return found


def test_the_rank_is_by_the_distance_of_those_that_came_furthest():
    found = trials(t00=30.0, t01=20.0, t02=25.0, t03=None)
    found["t01"].points = {5.0: Point(5.0, 20.0, None)}
    found["t01"].status = "stopped"
    assert [trial.name for trial in rank(found)] == ["t02", "t00", "t01"]
    assert decide(trials(t00=None)) is None


def test_without_repetitions_nothing_is_claimed():
    verdict = decide(trials(t00=30.0, t01=20.0))
    assert verdict is not None
    assert (verdict.best, verdict.distance, verdict.is_more_than_noise) == ("t01", 20.0, None)
    assert "luckiest" in verdict.text


def test_only_new_seeds_count_and_their_spread_is_pooled():
    found = trials(t00=1.0, t00_s1=30.0, t00_s2=34.0, t01=2.0, t01_s1=20.0, t01_s2=20.0)
    first, second = repeated(found)
    assert (first.trial, first.mean, second.mean) == ("t01", 20.0, 32.0), "the lucky first seed does not count"
    # Two degrees of freedom: (2^2 + 2^2) / 2 = 4 between seeds, so the mean of two has an error of sqrt(4 / 2).
    assert first.error == second.error == pytest.approx(math.sqrt(2))
    verdict = decide(found)
    assert verdict is not None
    # 4.303 * sqrt(2 + 2) = 8.6 is less than the difference of 12.
    assert (verdict.best, verdict.is_more_than_noise) == ("t01", True)
    assert "better than t00 by more than noise" in verdict.text


def test_the_metrics_own_error_counts_too():
    found = trials(t00=1.0, t00_s1=30.0, t00_s2=34.0, t01=2.0, t01_s1=20.0, t01_s2=20.0)
    for trial in found.values():
        trial.points = {10.0: Point(10.0, trial.points[10.0].value, 3.0)}
    verdict = decide(found)
    assert verdict is not None
    assert verdict.error == pytest.approx(math.sqrt((4 + 9) / 2))
    # 4.303 * sqrt(13) = 15.5 is more than the difference of 12.
    assert verdict.is_more_than_noise is False
    assert "no difference shown between t01 and t00 (worse by 12.00 +- 15.51)" in verdict.text


def test_equal_configurations_are_rarely_called_different():
    """Of equal ones the difference exceeds the noise in at most about one of twenty comparisons."""
    import random

    rng, claimed = random.Random(0), 0
    for _ in range(400):
        seeds = {f"t{i:02d}_s{s}": rng.gauss(100, 5) for i in range(2) for s in (1, 2)}
        verdict = decide(trials(t00=100.0, t01=100.0, **seeds))
        assert verdict is not None
        claimed += verdict.is_more_than_noise is True
    assert claimed <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_one_repeated_configuration_has_nothing_to_be_compared_with():
    verdict = decide(trials(t00=1.0, t01=2.0, t01_s1=3.0))
    assert verdict is not None
    assert (verdict.best, verdict.is_more_than_noise) == ("t01", None)
    assert "1 new seed;" in verdict.text
    assert verdict.error is None, "one seed shows no spread"


def test_one_new_seed_each_is_not_compared():
    """As after an interruption in the first round of repetitions."""
    found = trials(t00=1.0, t01=2.0, t00_s1=3.0, t01_s1=900.0)
    verdict = decide(found)
    assert verdict is not None
    assert (verdict.best, verdict.error, verdict.is_more_than_noise) == ("t00", None, None)
    assert "one seed each shows no spread" in verdict.text
    # With a second seed of one of them the spread is known: (2^2 + 2^2) / 1 = 8, over two seeds and over one.
    first, second = repeated(found | trials(t00_s1=28.0, t00_s2=32.0, t01_s1=20.0))
    assert (first.trial, first.error, second.error) == ("t01", pytest.approx(math.sqrt(8)), pytest.approx(2.0))
