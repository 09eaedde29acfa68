"""Whether a new version in the registry is better than the champion by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.metrics.numbers import num_generated

Z = 2.0
"""Standard errors of the difference by which a better metric must be better. One in 44 equal generators passes."""

MARGIN = 0.02
"""Share of the champion's metric by which a better one must be better if a standard error is unknown."""

# Tags that must agree for two values to be comparable, and the number of generated images. The metric's name contains
# the extractor.
_PROTOCOL = {
    "metric": "the metric's name",
    "metric_weights_sha256": "the weights of the metric network",
    "metric_resize": "the resizing",
    "metric_n_real": "the number of real images",
    "dataset_digest": "the data set",
}


_NUMBERS = {"metric_value": float, "metric_standard_error": float, "metric_n_fake": int}


def metric_tags(metric: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version that ``decide`` needs beside the metric's name and value, from an evaluation's result."""
    known = [key for key in ("weights_sha256", "resize", "n_real", "n_fake") if key in metric]
    tags = {f"metric_{key}": metric[key] for key in known}
    if "standard_error" in metric:
        tags["metric_standard_error"] = metric["standard_error"]
    return {key: str(value) for key, value in tags.items()}


def decide(new: Mapping[str, str], champion: Mapping[str, str] | None) -> tuple[bool, str]:
    """Whether the alias moves from the champion to a new version, and the reason, from the tags of both.

    All metrics are distances: lower is better. The new version wins if
    ``new + Z sqrt(se_new^2 + se_champion^2) < champion``, or, if a standard error is unknown, if it is lower by more
    than ``MARGIN``. Values that were computed in different ways, on different data, or on numbers of generated images
    that differ or are unknown do not compare.
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
    for key, kind in _NUMBERS.items():
        try:
            kind(champion.get(key, "0"))
        except ValueError:  # anybody can change a tag
            return False, f"not comparable: the champion's tag {key} is no number; repair it, or move the alias by hand"
    if differing := [what for key, what in _PROTOCOL.items() if new.get(key) != champion.get(key)]:
        return False, f"not comparable: {' and '.join(differing)} differ"
    if problem := _other_number(new, champion):
        return False, f"not comparable: {problem}; move the alias by hand to compare from now on"
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


def _other_number(new: Mapping[str, str], champion: Mapping[str, str]) -> str | None:
    """Why the numbers of generated images do not allow to compare, None if they do. A version that was registered
    before the number became a tag has it in its metric's name, if at all."""
    ours, theirs = (num_generated(tags["metric"], tags.get("metric_n_fake")) for tags in (new, champion))
    if ours is not None and theirs is not None:
        return f"{ours:,} generated images against {theirs:,}" if ours != theirs else None
    whose = "the champion" if ours is not None else "the new version"
    return f"the number of generated images of {whose} is not known, {new['metric']} is a rounded one"
