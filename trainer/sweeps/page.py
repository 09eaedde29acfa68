"""The page of a sweep, ``sweep.html``: one file that needs no server, no network and no other file.

It has the look, the security policy and the escaping of a run's report (``trainer.report.markup``).
"""

from __future__ import annotations

import datetime
import math
import shlex
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from catgan.command import UserError
from trainer.checkpoints.storage import open_storage
from trainer.report import markup
from trainer.report.charts import axis
from trainer.report.markup import image_url, section, table, text
from trainer.sweeps.plan import Plan
from trainer.sweeps.space import Choice, Dimension, Range, Value
from trainer.sweeps.state import Ledger, Trial
from trainer.sweeps.verdict import Verdict, rank

NAME = "sweep.html"

_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
_NUM_GRIDS = 3
_MAX_PIXELS = 1024  # of a grid of samples
_WIDTH, _HEIGHT = 800, 320
_TOP, _BOTTOM = 46, 26  # margins
_MAX_TICKS = 9  # of a choice


def render(plan: Plan, ledger: Ledger, verdict: Verdict | None, command: str | None, status: str) -> str:
    """The page as HTML.

    Args:
        verdict: which trial is best; None without any distance.
        command: trains it for longer.
        status: FINISHED, FAILED or KILLED.
    """
    best = verdict.best if verdict else ""
    trials = list(ledger.trials.values())
    searched = [trial for trial in trials if trial.of is None and trial.points]
    metric = ledger.metric or "distance"
    sections = [
        _facts(plan, ledger, verdict, metric),
        _verdict(plan, ledger, verdict, metric),
        _usage(command),
        section("Values and distances", _parallel(plan.dimensions, searched, metric, best)),
        section("Distance over training", _curves(plan, searched, metric, best)),
        _samples(ledger, verdict, metric),
        _trials(plan, trials, metric, best),
        section("Options of all trials", _code(shlex.join(plan.words))),
    ]
    word = _STATUS[status]
    space = ", ".join(map(str, plan.dimensions))
    return markup.document(
        title=ledger.storage.name,
        headline=f'<span class="badge {word}">{word}</span> Sweep of {text(plan.base.recipe)} over {text(space)}.',
        sections=sections,
        footer=f"{text(ledger.storage.location)} · written {markup.timestamp(datetime.datetime.now(datetime.UTC))}",
        styles=["report.css", "sweep.css"],
        scripts=["sweep.js"],
    )


def _facts(plan: Plan, ledger: Ledger, verdict: Verdict | None, metric: str) -> str:
    trials = list(ledger.trials.values())
    counts = {status: sum(trial.status == status for trial in trials) for status in ("done", "stopped", "failed")}
    spent = sum(trial.kimg for trial in trials)
    facts = [
        ("Trials", str(sum(trial.of is None for trial in trials)), f"of {plan.num_trials}, {plan.sweep.algorithm}"),
        ("Trained to the end", str(counts["done"]), f"{counts['stopped']} stopped early, {counts['failed']} failed"),
        ("Images seen", f"{spent:.4g} kimg", f"at most {plan.most_kimg():g}"),
    ]
    if verdict:
        error = f"+- {verdict.error:.2f}; " if verdict.error is not None else ""
        facts.insert(0, (metric, f"{verdict.distance:.2f}", f"{error}{verdict.best}; lower is better"))
    items = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{items}</dl>'


def _verdict(plan: Plan, ledger: Ledger, verdict: Verdict | None, metric: str) -> str:
    if verdict is None:
        return section("Result", "<p>No trial has come to an evaluation.</p>")
    values = ledger.trials[verdict.best].values
    chosen = ", ".join(f"{field} {value}" for field, value in values.items())
    body = f"<p><strong>{text(verdict.best)}</strong>: {text(chosen)}.</p><p>{text(verdict.text)}.</p>"
    if verdict.repeated:
        rows = [
            (
                one.trial,
                *(ledger.trials[one.trial].values.get(field, "") for field in plan.fields),
                ", ".join(f"{value:.2f}" for value in one.distances),
                f"{one.mean:.2f} +- {one.error:.2f}",
            )
            for one in verdict.repeated
        ]
        marks = [one.trial == verdict.best for one in verdict.repeated]
        body += table(["Repeated", *plan.fields, f"{metric} with new seeds", "mean"], rows, best=marks)
        body += (
            '<p class="hint">The best of many trials were chosen for their luck, too, so only the new seeds count here.'
            " The error is of the mean: spread between seeds, and the metric's own.</p>"
        )
    return section("Result", body)


def _usage(command: str | None) -> str:
    return section("Train it for longer", _code(command)) if command else ""


def _code(line: str) -> str:
    return f'<pre tabindex="0"><code>{text(line)}</code></pre>' if line else ""


# Charts. A line has the classes best, done, stopped or failed, and is marked by the script through data-trial.


def _parallel(dimensions: Sequence[Dimension], trials: Sequence[Trial], metric: str, best: str) -> str:
    """Parallel coordinates: an axis for each field and one for the distance, a line for each trial."""
    if not trials:
        return ""
    distances = [trial.last.value for trial in trials if trial.last]
    ticks, is_log = axis(min(distances), max(distances))
    to_unit = _scale(ticks[0], ticks[-1], is_log)
    axes: list[tuple[str, list[tuple[str, float]]]] = [(one.field, _axis(one)) for one in dimensions]
    axes.append((metric, [(f"{tick:.4g}", to_unit(tick)) for tick in ticks]))
    left, right = 70, _WIDTH - 70
    xs = [left + i * (right - left) / (len(axes) - 1) for i in range(len(axes))]

    def y(unit: float) -> float:
        return _HEIGHT - _BOTTOM - unit * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i, (name, _) in enumerate(axes):
        side = "left" if i == 0 else "right" if i == len(axes) - 1 else ""
        at = {"left": 4, "right": _WIDTH - 4}.get(side, xs[i])
        parts.append(f'<path class="axis" d="M{xs[i]:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="field {side}" x="{at:.1f}" y="{16 if i % 2 else 28}">{text(name)}</text>')
    for trial in _in_order(trials, best):
        assert trial.last is not None
        units = [_place(one, trial.values[one.field]) for one in dimensions] + [to_unit(trial.last.value)]
        line = " ".join(f"{x:.1f},{y(unit):.1f}" for x, unit in zip(xs, units, strict=True))
        parts.append(_line(trial, line, best))
    for i, (_, marks) in enumerate(axes):
        is_left = i == 0
        for mark, unit in marks:
            x, side = (xs[i] - 6, " left") if is_left else (xs[i] + 6, "")
            parts.append(f'<text class="tick{side}" x="{x:.1f}" y="{y(unit) + 4:.1f}">{text(mark)}</text>')
    label = f"{len(trials)} trials: their values and {metric}; the table below has the numbers"
    return _svg(parts, label) + _legend()


def _curves(plan: Plan, trials: Sequence[Trial], metric: str, best: str) -> str:
    """The distance of each trial over kimg."""
    if not trials:
        return ""
    values = [point.value for trial in trials for point in trial.points.values()]
    ticks, is_log = axis(min(values), max(values))
    to_unit = _scale(ticks[0], ticks[-1], is_log)
    left, right = 58, _WIDTH - 14

    def x(kimg: float) -> float:
        return left + kimg / plan.base.kimg * (right - left)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - to_unit(value) * (_HEIGHT - 12 - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="rule" d="M{left} {y(tick):.1f}H{right}"/>')
        parts.append(f'<text class="value" x="{left - 6}" y="{y(tick) + 4:.1f}">{tick:.4g}</text>')
    marks, _ = axis(0.0, plan.base.kimg)
    for tick in (mark for mark in marks if mark <= plan.base.kimg):
        parts.append(f'<text class="kimg" x="{x(tick):.1f}" y="{_HEIGHT - 8}">{tick:g}</text>')
    for trial in _in_order(trials, best):
        points = [(x(kimg), y(point.value)) for kimg, point in sorted(trial.points.items())]
        parts.append(_line(trial, " ".join(f"{a:.1f},{b:.1f}" for a, b in points), best))
        kind = "best" if trial.name == best else trial.status
        (a, b), name = points[-1], text(trial.name)
        parts.append(f'<circle class="end {kind}" data-trial="{name}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
    hint = f'<p class="hint">{text(metric)} over kimg, thousands of images seen; lower is better.</p>'
    return hint + _svg(parts, f"{metric} of {len(trials)} trials over kimg") + _legend()


def _svg(parts: Sequence[str], label: str) -> str:
    """A chart, which small screens scroll."""
    name = f'aria-label="{text(label)}"'
    start = f'<svg class="chart wide" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" {name}>'
    return f'<div class="scroll" role="region" {name} tabindex="0">{start}{"".join(parts)}</svg></div>'


def _legend() -> str:
    names = (("best", "best"), ("done", "trained to the end"), ("stopped", "stopped early or failed"))
    return '<p class="legend">' + "".join(f'<span class="{kind}">{label}</span>' for kind, label in names) + "</p>"


def _line(trial: Trial, points: str, best: str) -> str:
    kind = "best" if trial.name == best else trial.status
    last = f"{trial.last.value:.2f}" if trial.last else ""
    values = ", ".join(f"{field} {value}" for field, value in trial.values.items())
    title = f"<title>{text(f'{trial.name}: {values}: {last} at {trial.kimg:g} kimg')}</title>"
    return f'<polyline class="line {kind}" data-trial="{text(trial.name)}" points="{points}">{title}</polyline>'


def _in_order(trials: Sequence[Trial], best: str) -> list[Trial]:
    """The ones that matter last, which are drawn above the others."""
    return sorted(trials, key=lambda trial: (trial.name == best, trial.status == "done"))


def _scale(low: float, high: float, is_log: bool) -> Callable[[float], float]:
    """Values from ``low`` to ``high`` as 0 to 1."""
    if is_log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _place(one: Dimension, value: Value) -> float:
    """The place of a value on the axis of its field, 0 to 1."""
    if isinstance(one, Choice):
        return one.options.index(value) / max(len(one.options) - 1, 1)
    return _scale(one.low, one.high, one.is_log)(float(value))


def _axis(one: Dimension) -> list[tuple[str, float]]:
    """Ticks of the axis of a field, with their places."""
    if isinstance(one, Range):
        middle = math.sqrt(one.low * one.high) if one.is_log else (one.low + one.high) / 2
        texts = (one.text(one.low), one.text(float(f"{middle:.2g}")), one.text(one.high))
        return [(label, _place(one, label)) for label in texts]
    shown = one.options if len(one.options) <= _MAX_TICKS else (one.options[0], one.options[-1])
    return [(option, _place(one, option)) for option in shown]


def _samples(ledger: Ledger, verdict: Verdict | None, metric: str) -> str:
    """The last sample grids of the best trials."""
    if verdict is None:
        return ""
    order = [one.trial for one in verdict.repeated]
    order += [trial.name for trial in rank(ledger.trials) if trial.name not in order]
    figures = []
    for name in order[:_NUM_GRIDS]:
        trial = ledger.trials[name]
        grid = _last_grid(ledger.storage.join(name))
        if grid is None or trial.last is None:
            continue
        caption = f"{name}: {metric} {trial.last.value:.2f} at {trial.kimg:g} kimg"
        alt = escape(f"Generated images of {name}")
        figures.append(f'<figure><img alt="{alt}" src="{grid}"><figcaption>{text(caption)}</figcaption></figure>')
    body = f'<div class="samples three">{"".join(figures)}</div>' if figures else ""
    return section("Samples of the best", body)


def _last_grid(location: str) -> str | None:
    """The last sample grid of a run as a URL; None if there is none that can be read."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run = open_storage(location).copy(["samples"], Path(scratch))
            grids = sorted((run / "samples").glob("fakes_*kimg.png"))
            return image_url(grids[-1], _MAX_PIXELS) if grids else None
    except (OSError, UserError, ValueError):
        return None


def _trials(plan: Plan, trials: Sequence[Trial], metric: str, best: str) -> str:
    """All trials with a button that marks their lines, which the script enables."""
    if not trials:
        return ""
    heads = ["trial", *plan.fields, "seed", "kimg", metric, "status", "report"]
    rows = []
    for trial in sorted(
        trials, key=lambda trial: (trial.of is not None, -trial.kimg, trial.last.value if trial.last else 0)
    ):
        name = text(trial.name)
        can_mark = trial.of is None and bool(trial.points)
        button = (
            f'<button type="button" value="{name}" aria-pressed="false" disabled>{name}</button>' if can_mark else name
        )
        cells = [
            *(text(trial.values.get(field, "")) for field in plan.fields),
            str(trial.seed),
            f"{trial.kimg:g}",
            f"{trial.last.value:.2f}" if trial.last else "",
            text(f"{trial.status}: {trial.message}" if trial.message else trial.status),
            f'<a href="{name}/report.html" aria-label="Report of {name}">report</a>' if trial.is_over else "",
        ]
        mark = ' class="best"' if trial.name == best else ""
        rows.append(f"<tr{mark}><td>{button}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in heads)
    rows_of_trials = (
        '<div class="scroll" role="region" aria-label="All trials" tabindex="0"><table class="trials">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return section("Trials", '<p class="hint">A trial\'s button marks its lines in the charts.</p>' + rows_of_trials)
