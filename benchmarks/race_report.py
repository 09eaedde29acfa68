"""What race.py leaves behind: results.json, a table and the curves."""

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
    "kid": 5,
    "precision": 4,
    "recall": 4,
    "images_per_second": 1,
    "kimg": 3,
    "seconds": 2,
}
_COLUMNS = ("recipe", "distance", "live", "KID", "precision", "recall", "images/s", "kimg", "seconds")


def check_matplotlib() -> None:
    """Raises UserError where the curves could not be drawn, before hours went into them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("curves.png needs matplotlib: pip install 'catgan[dev]'")


def load_trainings(folder: Path) -> list[dict[str, Any]]:
    """The finished trainings in the folder of a race, none if it is new.

    Raises:
        UserError: results.json is not one of a race.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        trainings = json.loads(path.read_text(encoding="utf-8"))["trainings"]
        sound = all({"settings", "curve"} <= set(training) for training in trainings)
    except (OSError, ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not of a race: give another --out, or move it away")
    return trainings


def mean_row(name: str, trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of one recipe: means over its trainings, one a seed, of what stands at the end and of the curves."""
    curves = [training["curve"] for training in trainings]
    curve = [_mean(points) for points in zip(*curves, strict=True)]
    speeds = _mean([{key: t[key] for key in ("images_per_second", "seconds")} for t in trainings])
    finals = [curve[-1]["distance"] for curve in curves]
    keys = ("distance", "distance_live", "kid", "precision", "recall")
    return {
        "recipe": name,
        **{key: curve[-1][key] for key in keys},
        "images_per_second": speeds["images_per_second"],
        "kimg": curve[-1]["kimg"],
        "distance_std": round(statistics.stdev(finals), 2) if len(finals) > 1 else None,
        "seconds": speeds["seconds"],
        "seeds": len(trainings),
        "curve": curve,
    }


def _mean(records: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each entry; null where it is null in one of them."""
    means: dict[str, float | None] = {}
    for key in records[0]:
        values = [record[key] for record in records]
        known = [value for value in values if value is not None]
        means[key] = round(statistics.fmean(known), _DIGITS[key]) if len(known) == len(values) else None
    return means


def write_results(folder: Path, record: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> None:
    """results.json: what is printed, and every training with its settings and curve."""
    with atomic_path(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps({**record, "trainings": trainings}, indent=1) + "\n", encoding="utf-8")


def write_table(folder: Path, record: Mapping[str, Any]) -> None:
    """table.md: a line on how it was measured, and the results as a Markdown table, the smallest distance first."""
    seeds = "one seed" if record["seeds"] == 1 else f"means over {record['seeds']} seeds"
    lines = [
        f"{record['metric']} (distance, of the averaged weights) against {record['n_real']:,} pictures of the"
        f" {record['split']} split at {record['size']}x{record['size']} after {record['minutes']:g} minutes of"
        f" training, {seeds}; {record['machine']}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in sorted(record["results"], key=lambda row: row["distance"]):
        spread = "" if row["distance_std"] is None else f" ± {row['distance_std']:.1f}"
        cells = [
            row["recipe"],
            f"{row['distance']:.1f}{spread}",
            _cell(row["distance_live"], ".1f"),
            _cell(row["kid"], ".3g"),
            _cell(row["precision"], ".3f"),
            _cell(row["recall"], ".3f"),
            _cell(row["images_per_second"], ".0f"),
            _cell(row["kimg"], ".1f"),
            _cell(row["seconds"], ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    with atomic_path(folder / TABLE) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw_curves(folder: Path, record: Mapping[str, Any], trainings: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """curves.png: the distance against minutes and against images: seeds as thin lines, their mean as a thick one.

    Args:
        record: what is printed.
        trainings: of each recipe.
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
            places, distances = _line(row["curve"], x)
            if places:  # a foreign script need not tell its images
                axis.plot(places, distances, color=f"C{i}", linewidth=2.2, marker="o", label=row["recipe"])
        axis.set_xlabel(labels[x])
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel(f"{record['metric']}, averaged weights")
    figure.suptitle(f"{record['size']}x{record['size']}, {record['machine']}", fontsize="medium")
    with atomic_path(folder / CURVES) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _line(curve: Sequence[Mapping[str, Any]], x: str) -> tuple[list[float], list[float]]:
    points = [point for point in curve if point[x] is not None]
    return [point[x] for point in points], [point["distance"] for point in points]
