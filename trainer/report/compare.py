"""The comparison of runs: one HTML file with their sample grids, curves, differing options, best values and cost.

It is written from the same files of the runs' folders as the report of one run, see ``page``.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from catgan.command import UserError
from catgan.files import atomic_open
from trainer.report.charts import Series, chart
from trainer.report.history import FILES, History, read
from trainer.report.markup import document, duration, image_url, plain, section, table, text, timestamp

NAME = "compare.html"
MAX_RUNS = 12
NEEDED = (*FILES, "samples")
"""The files and folders of a run that the comparison reads."""

_MAX_GRIDS = 120  # on the page; each run has an equal share
_MAX_STEPS = 24  # of the slider
_MAX_PIXELS = 512  # of a grid's longer side
_QUALITY = 80  # of WebP
# Title and hint of the charts besides those of the metrics, by the name of the value.
_CHARTS = {
    "diversity": ("Diversity", "Near 0: mode collapse."),
    "loss/generator": ("Generator's loss", "Neither loss measures quality. Different losses have different scales."),
    "loss/discriminator": ("Discriminator's loss", "Different losses have different scales."),
    "d/real": ("Logits of real images", "The discriminator's mean output."),
    "d/fake": ("Logits of generated images", "The discriminator's mean output."),
    "d/overfitting": ("Overfitting", "Near 1: training images are memorised."),
}


@dataclass(frozen=True, eq=False)
class _Run:
    """One of the runs: ``label`` is unique among them, ``colour`` is its position."""

    label: str
    colour: int
    history: History

    @property
    def metric(self) -> str | None:
        """The metric that chooses its best generator; None: not evaluated yet."""
        return next(iter(self.history.metric_names), None)

    @property
    def digest(self) -> str | None:
        """The digest of its data set; None: not recorded."""
        digest = self.history.opened.get("dataset", {}).get("digest") or self.history.config.get("dataset_digest")
        return str(digest) if digest else None


def write_comparison(runs: Sequence[tuple[str, Path]], path: Path) -> Path:
    """Write the comparison of two to twelve runs.

    Args:
        runs: the path or URL of each, as users see it, and its folder; in the order of the page.
        path: the file to write.

    Returns:
        ``path``.

    Raises:
        UserError: a run is given twice, a folder is not a run, a file is damaged, or ``path`` cannot be written.
    """
    assert 2 <= len(runs) <= MAX_RUNS, len(runs)
    seen: set[Path] = set()
    for location, folder in runs:
        if (same := folder.resolve()) in seen:
            raise UserError(f"{location} is given twice: give each run once")
        seen.add(same)
    labels = _labels([location for location, _ in runs])
    histories = [read(folder, location=location) for location, folder in runs]
    page = _page([_Run(label, i, history) for i, (label, history) in enumerate(zip(labels, histories, strict=True))])
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _labels(locations: Sequence[str]) -> list[str]:
    """The last component of each location, with as many before it as distinguish all."""
    parts = [location.rstrip("/").split("/") for location in locations]
    count = 1
    while len({tuple(one[-count:]) for one in parts}) < len(parts):
        count += 1
        assert count <= max(map(len, parts)), locations
    return [plain("/".join(one[-count:])) for one in parts]


def _page(runs: Sequence[_Run]) -> str:
    samples, unreadable = _samples(runs)
    return document(
        f"Comparison of {len(runs)} runs",
        " · ".join(text(run.label) for run in runs),
        [_warnings(runs, unreadable), _summary(runs), samples, _curves(runs), _options(runs)],
        f"report written {timestamp(datetime.datetime.now(datetime.UTC))}",
        styles=("report.css", "compare.css"),
        scripts=("charts.js", "compare.js"),
    )


# Sections, in their order on the page. An empty string leaves one out.


def _warnings(runs: Sequence[_Run], unreadable: Sequence[str]) -> str:
    lines = [f"<li>{text(line)}</li>" for line in (*_incomparable(runs), *unreadable)]
    return section("Warnings", f"<ul>{''.join(lines)}</ul>" if lines else "", "warnings")


def _incomparable(runs: Sequence[_Run]) -> list[str]:
    """Why the distances of the runs cannot be compared."""
    evaluated = [run for run in runs if run.metric is not None]
    reasons = []
    for subject, values in (
        ("data sets", {run: f"digest {run.digest[:12]}" if run.digest else "not recorded" for run in runs}),
        ("metric networks", {run: _network(run.metric or "") for run in evaluated}),
        ("metrics", {run: run.metric or "" for run in evaluated}),
        ("numbers of generated images", {run: _evaluated_images(run) for run in evaluated}),
        ("weights of the metric network", {run: found[:12] for run in evaluated if (found := _weights(run))}),
    ):
        if len(set(values.values())) > 1:
            groups = {value: [run.label for run, one in values.items() if one == value] for value in values.values()}
            listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            reasons.append(f"The {subject} differ, so distances between these runs are not comparable. {listed}.")
            if subject != "data sets":
                break  # the names of metrics have the network and the number
    return reasons


def _network(metric: str) -> str:
    """The network of a metric by its name: ``fd2k_efflite0`` -> ``efflite0``; ``fid50k`` -> ``inception``."""
    return metric.partition("_")[2] or "inception"


def _evaluated_images(run: _Run) -> str:
    return str(run.history.opened.get("params", {}).get("eval.num", "not recorded"))


def _weights(run: _Run) -> str | None:
    """The digest of the metric network's weights, which is recorded at the end of a run."""
    models = [record["info"] for record in run.history.records if record["kind"] == "model"]
    metric = (models[-1].get("metric") if models else None) or {}
    return str(metric["weights_sha256"]) if "weights_sha256" in metric else None


def _summary(runs: Sequence[_Run]) -> str:
    """Best values and cost of each run."""
    metrics = list(dict.fromkeys(run.metric for run in runs if run.metric is not None))
    comparable = not _incomparable(runs)
    rows = []
    for run in runs:
        history = run.history
        goal = history.config.get("kimg")
        cells = []
        for name in metrics:
            best = history.best(name)
            cells.append("–" if best is None else f"{best[name]:.2f} at {best['kimg']:g} kimg")
        cells += [
            f"{history.kimg:g}" + (f" of {goal:g}" if isinstance(goal, int | float) else ""),
            duration(history.seconds) if history.records else "–",
            str(history.config.get("recipe", "–")),
            history.state,
            (run.digest or "–")[:12],
        ]
        rows.append(cells)
    values = [best[metrics[0]] if (best := run.history.best(metrics[0])) else None for run in runs] if metrics else []
    lowest = min((value for value in values if value is not None), default=None)
    marks = [comparable and value is not None and value == lowest for value in values] or [False] * len(runs)
    heads = [*(f"best {name}" for name in metrics), "kimg", "time", "recipe", "status", "data set"]
    hint = "Lower distances are better. Time is that of training and evaluation, without interruptions."
    body = table(["Run", *heads], [(run.label, *cells) for run, cells in zip(runs, rows, strict=True)], "runs", marks)
    return section("Best values and cost", f'<p class="hint">{hint}</p>{body}')


def _samples(runs: Sequence[_Run]) -> tuple[str, list[str]]:
    """The grids of each run under one slider, and messages about the files that cannot be read."""
    grids = [
        {_kimg_of(path): path for path in (run.history.folder / "samples").glob("fakes_*kimg.png")} for run in runs
    ]
    steps = _evenly(sorted({kimg for paths in grids for kimg in paths}), min(_MAX_STEPS, _MAX_GRIDS // len(runs)))
    boxes, unreadable = [], []
    for run, paths in zip(runs, grids, strict=True):
        frames, broken = _frames(run, paths, steps)
        unreadable += broken
        boxes.append(
            f'<div class="run"><h3>{_key(run)}</h3><div class="frames">{"".join(frames)}</div>'
            f'<p class="none{"" if frames else " current"}">No sample grid yet.</p></div>'
        )
    if not steps:
        return section("Samples", "<p>No sample grids yet.</p>"), unreadable
    player = (
        '<div class="player"><button type="button" id="play">Play</button><input type="range" id="at" min="0"'
        f' max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="Training progress"'
        f' data-steps="{" ".join(map(str, steps))}"><output for="at"></output></div>'
    )
    hint = (
        "<p class=\"hint\">Each run's latest grid at or below the slider's kimg, by the EMA generator. Each position in"
        " a grid has the same seed throughout.</p>"
    )
    return section("Samples", f'{hint}{player}<div class="grids">{"".join(boxes)}</div>'), unreadable


def _frames(run: _Run, paths: Mapping[int, Path], steps: Sequence[int]) -> tuple[list[str], list[str]]:
    """The figures of the grids that ``steps`` need, and messages about those that cannot be read."""
    needed = dict.fromkeys(max(at) for step in steps if (at := [kimg for kimg in paths if kimg <= step]))
    frames, unreadable = [], []
    for kimg in needed:
        try:
            url = image_url(paths[kimg], _MAX_PIXELS, _QUALITY)
        except ValueError as error:
            unreadable.append(f"{run.label}: {error}")
            continue
        caption = f"{kimg} kimg{_metric_at(run, kimg)}"
        alt = f"Generated images of {run.label} at {kimg} kimg"
        frames.append(
            f'<figure data-kimg="{kimg}"><img alt="{text(alt)}" src="{url}">'
            f"<figcaption>{text(caption)}</figcaption></figure>"
        )
    return frames, unreadable


def _metric_at(run: _Run, kimg: int) -> str:
    """The metric at ``kimg``, rounded down as in the names of grids; empty if it was not evaluated there."""
    rows = run.history.metrics
    values = [row.get(run.metric) for row in rows if int(row["kimg"]) == kimg] if run.metric else []
    return next((f": {run.metric} {value:.2f}" for value in values if value is not None), "")


def _kimg_of(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem)) or 0)


def _evenly(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``values``, by even steps, the first and the last among them."""
    count = min(len(values), most)
    return [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]


def _curves(runs: Sequence[_Run]) -> str:
    metrics = dict.fromkeys(name for run in runs for name in run.history.metric_names)
    charts = {name: (name, "Lower is better.") for name in metrics} | _CHARTS
    ends = {
        "kimg": max(run.history.kimg for run in runs),
        "hours": max((hours for run in runs for hours in run.history.hours.values()), default=0.0),
    }
    boxes = [box for name, (title, hint) in charts.items() if (box := _chart(runs, ends, name, title, hint))]
    if not boxes:
        return section("Curves", "<p>No metrics yet.</p>")
    hint = '<p class="hint">Point at a curve for the values of all runs there.</p>'
    axis = (
        '<fieldset class="axis"><legend>Horizontal axis</legend>'
        '<label><input type="radio" name="axis" value="kimg" checked> kimg, thousands of images seen</label>'
        '<label><input type="radio" name="axis" value="hours"> hours of training</label></fieldset>'
    )
    return section("Curves", f'{hint}{axis}<div class="charts">{"".join(boxes)}</div>')


def _chart(runs: Sequence[_Run], ends: Mapping[str, float], name: str, title: str, hint: str) -> str:
    """The value ``name`` of all runs that have it, over kimg and over hours; empty if none has it."""
    axes = {
        "kimg": [(run, run.history.series(name)) for run in runs],
        "hours": [(run, run.history.series_over_hours(name)) for run in runs],
    }
    figures: list[str] = []
    shown: dict[int, _Run] = {}
    for unit, found in axes.items():
        series = [replace(one, name=run.label, colour=run.colour) for run, one in found if one.finite]
        shown |= {run.colour: run for run, one in found if one.finite}
        figure = _figure(series, ends[unit], unit) if series and ends[unit] > 0 else "<p>No times are recorded.</p>"
        figures.append(f'<div class="over" data-unit="{unit}">{figure}</div>')
    if not shown:
        return ""
    keys = "".join(f"{_key(run, '<output></output>')}" for run in shown.values())
    return (
        f'<div><h3>{text(title)}</h3><div class="hint">{text(hint)}</div><div class="keys">{keys}</div>'
        f"<div>{''.join(figures)}</div></div>"
    )


def _figure(series: Sequence[Series], end: float, unit: str) -> str:
    dots = max(len(one.points) for one in series) <= 40
    return f'{chart(series, end, dots=dots, unit=unit)}<div class="unit">{unit}</div>'


def _key(run: _Run, more: str = "") -> str:
    """The run's name with its colour and line."""
    return f'<span class="key c{run.colour}"><i></i><b>{text(run.label)}</b> {more}</span>'


def _options(runs: Sequence[_Run]) -> str:
    """The options that differ."""
    known = [run for run in runs if run.history.config]
    flat = [run.history.settings for run in known]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = [
        (f"--{name.replace('_', '-')}" if name != "recipe" else name, *cells)
        for name in names
        if len(set(cells := [values.get(name, "–") for values in flat])) > 1
    ]
    unknown = [run.label for run in runs if not run.history.config]
    body = table(["Option", *(run.label for run in known)], rows, "options") if rows else "<p>No option differs.</p>"
    if unknown:
        body += f"<p>Without config.json, so of unknown options: {text(', '.join(unknown))}.</p>"
    return section("Options that differ", body)
