from __future__ import annotations

import pytest

from trainer.metrics.evaluate import metric_name
from trainer.metrics.numbers import is_same_metric, num_generated


@pytest.mark.parametrize("number", [2, 300, 999, 1000, 2048, 2999, 50_000])
@pytest.mark.parametrize("extractor", ["inception", "efflite0", "inception-1a2b3c4d"])
def test_the_number_is_the_recorded_one_or_that_in_an_exact_name(number: int, extractor: str) -> None:
    name = metric_name("fid", extractor, number, force=True)
    assert num_generated(name, number) == num_generated(name, str(number)) == number
    assert num_generated(name) == (number if number < 1000 else None)


def test_is_same_metric() -> None:
    result = {"name": "fid2k", "n_fake": 2048}
    assert is_same_metric(result, dict(result))
    assert not is_same_metric(result, {"name": "fid2k", "n_fake": 2999})
    assert not is_same_metric(result, {"name": "kid2k", "n_fake": 2048})
    assert not is_same_metric({"name": "fid2k"}, {"name": "fid2k"}), "2,048 and 2,999 images have this name"
    assert is_same_metric({"name": "fd300_efflite0"}, {"name": "fd300_efflite0", "n_fake": 300})
