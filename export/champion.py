"""Whether a new version is better than the champion by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Z = 2.0
"""Standard errors of the difference that a better metric has to be better by: with less, one in 44 equal generators
would win."""

MARGIN = 0.02
"""Of the champion's metric, where a standard error is not known."""

# Two values compare only if all of these agree: the name holds the extractor and the number of generated pictures.
_PROTOCOL = {
    "metric": "the metric's name",
    "metric_weights_sha256": "the weights of the network that judges",
    "metric_resize": "the resizing before it",
    "metric_n_real": "the number of real pictures",
    "dataset_digest": "the data set",
}


def tags_of(metric: Mapping[str, Any]) -> dict[str, str]:
    """What ``decide`` needs to know of an evaluation's result beyond its name and value, as tags of a version."""
    tags = {f"metric_{key}": metric[key] for key in ("weights_sha256", "resize", "n_real") if key in metric}
    if "standard_error" in metric:
        tags["metric_standard_error"] = metric["standard_error"]
    return {key: str(value) for key, value in tags.items()}


def decide(new: Mapping[str, str], champion: Mapping[str, str] | None) -> tuple[bool, str]:
    """Whether the alias moves from the champion to a new version, by the tags of both, and why or why not.

    Every metric that can choose a best generator is a distance: lower is better. The new one wins with
    ``new + Z sqrt(se_new^2 + se_champion^2) < champion``, or where a standard error is unknown if it is lower by more
    than ``MARGIN``. Values that were measured in different ways, or against other pictures, do not compare.
    """
    if "metric_value" not in new:
        return False, "it was not measured"
    if new.get("precision", "fp32") != "fp32":
        return False, f"it is a variant ({new['precision']}); a champion is in fp32"
    if not math.isfinite(float(new["metric_value"])):
        return False, "its metric is no number"
    if champion is None:
        return True, "there was none"
    if "metric_value" not in champion:
        return True, "the champion was not measured"
    if differing := [what for key, what in _PROTOCOL.items() if new.get(key) != champion.get(key)]:
        return False, f"not comparable: {' and '.join(differing)} differ"
    ours, theirs = float(new["metric_value"]), float(champion["metric_value"])
    if not math.isfinite(theirs):
        return True, "the champion's metric is no number"
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
