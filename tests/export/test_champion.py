from __future__ import annotations

import pytest

from export.champion import decide, metric_tags
from export.evaluate import with_evaluation


def version(value: float, error: float | None = None, **changes: str) -> dict[str, str]:
    tags = {"metric": "fid2k", "metric_value": str(value), "metric_n_fake": "2048", "dataset_digest": "dada"} | changes
    return tags if error is None else tags | {"metric_standard_error": str(error)}


def before_the_number_was_a_tag(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key != "metric_n_fake"}


@pytest.mark.parametrize(
    ("new", "champion", "moves", "expected"),
    [
        (version(10), None, True, "there was no champion"),
        ({}, None, False, "not evaluated"),
        (version(float("nan")), None, False, "not finite"),
        (version(10), version(float("nan")), True, "not finite"),
        # sqrt(0.3^2 + 0.4^2) = 0.5, so two standard errors are 1
        (version(8.9, 0.3), version(10, 0.4), True, "2 standard errors are 1"),
        (version(9.1, 0.3), version(10, 0.4), False, "not better by more than noise"),
        # one error unknown: 2% of 10
        (version(9.7, 0.3), version(10), True, "2% are 0.2"),
        (version(9.9), version(10), False, "no standard error is known"),
        (version(1, dataset_digest="beef"), version(10), False, "the data set differ"),
        (version(1, metric_n_real="5"), version(10), False, "number of real images"),
        # "fid2k" has between 2,000 and 2,999 images
        (version(1, metric_n_fake="2999"), version(10), False, "not comparable: 2,999 generated images against 2,048"),
        (version(1), before_the_number_was_a_tag(version(10)), False, "images of the champion is not known"),
        (before_the_number_was_a_tag(version(1)), version(10), False, "images of the new version is not known"),
        (version(1), before_the_number_was_a_tag(version(10)), False, "move the alias by hand"),
        (version(1, metric="fd300", metric_n_fake="300"), {"metric": "fd300", "metric_value": "10"}, False, "data set"),
        (
            version(1, metric="fd300_efflite0", metric_n_fake="300"),
            before_the_number_was_a_tag(version(10, metric="fd300_efflite0")),
            True,
            "better",
        ),
        (version(1, precision="int8"), version(10), False, "a variant"),
        (version(float("nan")), version(10), False, "not finite"),
    ],
)
def test_the_champion_moves_only_to_a_version_that_is_better_by_more_than_noise(
    new: dict[str, str], champion: dict[str, str] | None, moves: bool, expected: str
) -> None:
    decided, reason = decide(new, champion)
    assert decided is moves
    assert expected in reason


@pytest.mark.parametrize("key", ["metric_value", "metric_standard_error", "metric_n_fake"])
def test_a_tag_that_somebody_has_changed_is_named(key: str) -> None:
    tags = {"metric": "fd2k_efflite0", "metric_value": "50", "metric_standard_error": "1", "metric_n_fake": "2048"}
    moves, reason = decide(tags, tags | {key: "n/a"})
    assert not moves
    assert f"the champion's tag {key} is no number" in reason


def test_metric_tags() -> None:
    metric = {"name": "fid2k", "value": 5.0, "weights_sha256": "feed", "n_real": 96, "n_fake": 2048}
    assert metric_tags(metric | {"standard_error": 0.25}) == {
        "metric_weights_sha256": "feed",
        "metric_n_real": "96",
        "metric_n_fake": "2048",
        "metric_standard_error": "0.25",
    }


def test_with_evaluation() -> None:
    result = {"name": "fid2k", "value": 5.01, "n_fake": 2048, "standard_error": 0.25}
    metric = {"name": "fid2k", "value": 5.0, "n_fake": 2048}
    info = {"kimg": 3.0, "metric": metric}
    assert with_evaluation(info, result)["metric"] == metric | {"standard_error": 0.25}
    assert with_evaluation(info, result | {"n_fake": 2999}) == info
    assert with_evaluation({"kimg": 3.0, "metric": None}, result)["metric"] == result
    other = info | {"metric": {"name": "fid50k", "value": 4.0}}
    assert with_evaluation(other, result) == other
    assert with_evaluation(info, None) == info
