"""What race.py writes: results.json, a Markdown table and curves."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catgan.command import UserError
from catgan.files import atomic_path

RESULTS, TABLE, CURVES = "results.json", "table.md", "curves.png"

_DIGITS = {
    "minutes": 3,
    "distance": 2,
    "distance_live": 2,
    "distance_second": 2,
    "kid": 5,
    "precision": 4,
    "recall": 4,
    "images_per_second": 1,
    "kimg": 3,
    "seconds": 2,
}
_COLUMNS = {  # heading: key and format of a row's entry
    "worst": ("distance_worst", ".1f"),
    "second": ("distance_second", ".1f"),
    "raw": ("distance_live", ".1f"),
    "KID": ("kid", ".3g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "images/s": ("images_per_second", ".0f"),
    "kimg": ("kimg", ".1f"),
    "seconds": ("seconds", ".0f"),
}

Training = Mapping[str, Any]
"""A finished training: its settings and what ``race_training.train`` returns."""


def check_matplotlib() -> None:
    """Raises UserError if the curves could not be drawn: better now than after hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("curves.png needs matplotlib: pip install 'catgan[dev]'")


def load_trainings(folder: Path) -> list[dict[str, Any]]:
    """The finished trainings in the folder of a race; none if it is new.

    Raises:
        UserError: results.json is not from a race.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        trainings = json.loads(path.read_text(encoding="utf-8"))["trainings"]
        valid = all({"settings", "curve"} <= set(training) for training in trainings)
    except (OSError, ValueError, LookupError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path} is not from a race: give another --out, or move it away")
    return trainings


def median_row(name: str, trainings: Sequence[Training]) -> dict[str, Any]:
    """The row of one recipe: medians over its trainings, one per seed, of the final values and of the curves, and the
    worst final distance."""
    curve = [_median(points) for points in zip(*(training["curve"] for training in trainings), strict=True)]
    speed = _median([{key: training[key] for key in ("images_per_second", "seconds")} for training in trainings])
    keys = ("distance", "distance_second", "distance_live", "kid", "precision", "recall")
    return {
        "recipe": name,
        **{key: curve[-1][key] for key in keys},
        "images_per_second": speed["images_per_second"],
        "kimg": curve[-1]["kimg"],
        "distance_worst": max(training["curve"][-1]["distance"] for training in trainings),
        "seconds": speed["seconds"],
        "seeds": len(trainings),
        "curve": curve,
    }


def _median(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {key: round(statistics.median(record[key] for record in records), _DIGITS[key]) for key in records[0]}


def write_results(folder: Path, record: Mapping[str, Any], trainings: Sequence[Training]) -> None:
    """Write results.json: ``record``, and every training with its settings and curve."""
    with atomic_path(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps({**record, "trainings": trainings}, indent=1) + "\n", encoding="utf-8")


def write_table(folder: Path, record: Mapping[str, Any]) -> None:
    """Write table.md: a line on how it was measured, and the results as a table, the smallest distance first."""
    seeds = "ONE SEED" if record["seeds"] == 1 else f"medians over {record['seeds']} seeds, and the worst distance"
    headings = ("recipe", "distance", *_COLUMNS)
    lines = [
        f"{record['metric']} (distance, of the EMA generator) against {record['n_real']:,} images of the"
        f" {record['split']} split at {record['size']}x{record['size']} after {record['minutes']:g} minutes of"
        f" training, {seeds}; second: {record['second']}; {record['machine']}.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for row in sorted(record["results"], key=lambda row: row["distance"]):
        cells = [row["recipe"], f"{row['distance']:.1f}"]
        cells += [format(row[key], form) for key, form in _COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_path(folder / TABLE) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_curves(folder: Path, record: Mapping[str, Any], trainings: Mapping[str, Sequence[Training]]) -> None:
    """Draw curves.png: the distance by minutes and by images, a thin line per seed and a thick one for their median.

    Args:
        record: what race.py prints.
        trainings: those of each recipe.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"minutes": "minutes of training", "kimg": "images seen (kimg)"}
    for axis, x in zip(axes, labels, strict=True):
        for i, row in enumerate(record["results"]):
            for training in trainings[row["recipe"]]:
                axis.plot(*_line(training["curve"], x), color=f"C{i}", linewidth=0.8, alpha=0.5)
            axis.plot(*_line(row["curve"], x), color=f"C{i}", linewidth=2.2, marker="o", label=row["recipe"])
        axis.set_xlabel(labels[x])
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel(f"{record['metric']}, EMA generator")
    figure.suptitle(f"{record['size']}x{record['size']}, {record['machine']}", fontsize="medium")
    with atomic_path(folder / CURVES) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _line(curve: Sequence[Mapping[str, Any]], x: str) -> tuple[list[float], list[float]]:
    return [point[x] for point in curve], [point["distance"] for point in curve]
