"""Whether a new version in the registry is better than the champion by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z = 2.0
"""Standard errors of the difference by which a better metric must be better. One in 44 equal generators passes."""

MARGIN = 0.02
"""Share of the champion's metric by which a better one must be better if a standard error is unknown."""

# Tags that must agree for two values to be comparable. The metric's name contains the extractor and the number of
# generated images.
_PROTOCOL = {
    "metric": "the metric's name",
    "metric_weights_sha256": "the weights of the metric network",
    "metric_resize": "the resizing",
    "metric_n_real": "the number of real images",
    "dataset_digest": "the data set",
}


def metric_tags(metric: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version that ``decide`` needs beside the metric's name and value, from an evaluation's result."""
    tags = {f"metric_{key}": metric[key] for key in ("weights_sha256", "resize", "n_real") if key in metric}
    if "standard_error" in metric:
        tags["metric_standard_error"] = metric["standard_error"]
    return {key: str(value) for key, value in tags.items()}


def decide(new: Mapping[str, str], champion: Mapping[str, str] | None) -> tuple[bool, str]:
    """Whether the alias moves from the champion to a new version, and the reason, from the tags of both.

    All metrics are distances: lower is better. The new version wins if
    ``new + Z sqrt(se_new^2 + se_champion^2) < champion``, or, if a standard error is unknown, if it is lower by more
    than ``MARGIN``. Values that were computed in different ways or on different data do not compare.
    """
    if "metric_value" not in new:
        return False, "it was not evaluated"
    if new.get("precision", "fp32") != "fp32":
        return False, f"it is a variant ({new['precision']}); only fp32 can be champion"
    if not math.isfinite(float(new["metric_value"])):
        return False, "its metric is not finite"
    if champion is None:
        return True, "there was no champion"
    if "metric_value" not in champion:
        return True, "the champion was not evaluated"
    if differing := [what for key, what in _PROTOCOL.items() if new.get(key) != champion.get(key)]:
        return False, f"not comparable: {' and '.join(differing)} differ"
    ours, theirs = float(new["metric_value"]), float(champion["metric_value"])
    if not math.isfinite(theirs):
        return True, "the champion's metric is not finite"
    errors = [tags.get("metric_standard_error") for tags in (new, champion)]
    if all(error is not None for error in errors):
        noise = Z * math.hypot(*(float(error) for error in errors if error is not None))
        basis = f"{Z:g} standard errors are {noise:.3g}"
    else:
        noise = MARGIN * theirs
        basis = f"{MARGIN:.0%} are {noise:.3g}, no standard error is known"
    wins = ours + noise < theirs
    return (
        wins,
        f"{new['metric']} {ours:.4g} against {theirs:.4g}: {'' if wins else 'not '}better by more than noise ({basis})",
    )
