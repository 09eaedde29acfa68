"""The number of generated images of a metric's value: values of different numbers do not compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def num_generated(name: str, recorded: object = None) -> int | None:
    """The number of generated images of the metric ``name``: the ``recorded`` one (``n_fake``), otherwise that in the
    name. None if it is unknown, since from 1,000 on names are rounded: "fid2k" stands for 2,000 to 2,999 images."""
    if recorded is not None:
        return int(str(recorded))
    exact = re.fullmatch(r"[a-z]+(\d+)(_[\w-]+)?", name)
    return int(exact[1]) if exact else None


def is_same_metric(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results, ``name`` and ``n_fake`` if it is known, are of one metric and equal numbers of generated
    images."""
    numbers = {num_generated(result["name"], result.get("n_fake")) for result in (one, other)}
    return one["name"] == other["name"] and len(numbers) == 1 and None not in numbers
