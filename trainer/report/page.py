"""``report.html``: what a training did, on one page that needs no server, no network and no other file.

It is made of what the run's folder holds: ``config.json``, ``metrics.jsonl``, the sample grids, and the records in
``outbox.jsonl``. Any of these may be missing, since a run may just have begun or have been cut off.

Names and messages on the page come from outside. ``_text`` escapes each and removes passwords and signatures of URLs,
and the page's own policy lets no script run but the one that belongs to it.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from catgan.command import UserError, without_queries
from catgan.files import atomic_open
from trainer.recipes import resolve
from trainer.report.charts import Series, chart
from trainer.report.history import History, read
from trainer.tracking.outbox import redact

NAME = "report.html"

_MOST_FRAMES = 60  # of the slider; long trainings have more grids than anyone looks at
_LONGEST = 768
_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}

# Title, what is good, and the curves of a chart; whatever is in none of these gets one of its own.
_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "Neither should run away; they do not tell quality.", ("loss/generator", "loss/discriminator")),
    (
        "What the discriminator says",
        "Of real and generated pictures; of train and val.",
        ("d/real", "d/fake", "d/train", "d/val"),
    ),
    (
        "Signs of trouble",
        "Diversity near 0: collapse. Overfitting near 1: data known by heart.",
        ("diversity", "d/overfitting", "d/sign"),
    ),
    ("Penalties", "A small share of the discriminator's loss.", ("loss/r1r2", "loss/gp")),
    ("Learning rates", "As the recipe's schedules say.", ("lr/generator", "lr/discriminator")),
    ("Speed", "Pictures a second while training.", ("speed/images_per_second",)),
    (
        "Time not trained",
        "Shares spent waiting for pictures and evaluating.",
        ("speed/data_wait", "speed/evaluation_share"),
    ),
)


def write_report(run_dir: Path, path: Path | None = None, status: str | None = None) -> Path:
    """Write the report of the run in the folder ``run_dir``.

    Args:
        path: default: ``report.html`` in the run's folder.
        status: FINISHED, FAILED or KILLED; default: what the record says, which knows nothing of a run's end before it
            has ended.

    Returns:
        The path.

    Raises:
        UserError: not a run, a damaged file, or ``path`` cannot be written.
    """
    path = path or run_dir / NAME
    page = _page(read(run_dir, status))
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _page(run: History) -> str:
    web = resources.files("trainer.report") / "web"
    style, script = ((web / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    samples = _samples(run)  # first, since it may find broken pictures to warn of
    sections = [_facts(run), _warnings(run), samples]
    sections += [section(run) for section in (_curves, _evaluations, _settings, _data, _use)]
    return Template((web / "report.html").read_text(encoding="utf-8")).substitute(
        name=_text(run.folder.resolve().name),
        headline=_headline(run),
        sections="\n".join(filter(None, sections)),
        footer=_footer(run),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _text(value: object) -> str:
    """Fit to stand anywhere in HTML, attributes included."""
    return escape(without_queries(redact(str(value))))


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>' if body else ""


def _table(head: Sequence[str], rows: Collection[Sequence[object]], kind: str = "", best: Sequence[bool] = ()) -> str:
    """Cells are plain text. The rows that ``best`` is true of stand out."""
    lines = []
    for row, mark in zip(rows, best or [False] * len(rows), strict=True):
        start = '<tr class="best">' if mark else "<tr>"
        lines.append(start + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" role="region" aria-label="{_text(head[0])}" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _headline(run: History) -> str:
    word = _STATUS.get(run.status or "", "unfinished")
    recipe = run.config.get("recipe", "unknown recipe")
    told = "" if run.status else " It goes on, or was cut off."
    return f'<span class="badge {word}">{word}</span> {_text(recipe)}.{told}'


def _facts(run: History) -> str:
    goal = run.config.get("kimg")
    facts = [("Images seen", f"{run.kimg:g} kimg", f"of {goal:g}" if goal else "")]
    for name in run.metric_names[:1]:
        if (best := run.best(name)) is not None:
            facts.insert(0, (name, f"{best[name]:.2f}", f"best, at {best['kimg']:g} kimg; lower is better"))
    speeds = [row["speed/images_per_second"] for row in run.metrics if row.get("speed/images_per_second")]
    if speeds:
        facts.append(("Speed", f"{len(speeds) / sum(1 / s for s in speeds):.0f} images/s", "while training"))
    if run.records:
        began = datetime.datetime.fromtimestamp(run.records[0]["time"] / 1000, datetime.UTC)
        facts.append(("Took", _duration(run.seconds), f"began {began:%Y-%m-%d %H:%M} UTC"))
    items = "".join(f"<div><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{items}</dl>'


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _warnings(run: History) -> str:
    lines = [
        f"<li>{_text(r['text'])} <time>({_text(r['note'])}, {r['nimg'] / 1000:g} kimg)</time></li>"
        for r in run.records
        if r["kind"] == "note"
    ]
    lines += [f"<li>{_text(problem)}</li>" for problem in dict.fromkeys(run.problems)]
    return _section("Warnings", f"<ul>{''.join(lines)}</ul>" if lines else "", "warnings")


def _samples(run: History) -> str:
    paths = sorted((run.folder / "samples").glob("fakes_*kimg.png"))
    count = min(len(paths), _MOST_FRAMES)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    frames = []
    for path in chosen:
        if picture := _picture(run, path):
            kimg = int("".join(filter(str.isdigit, path.stem)) or 0)
            frames.append(
                f'<figure data-kimg="{kimg}"><img alt="Generated pictures at {kimg} kimg" src="{picture}">'
                f"<figcaption>Generated, after {kimg} kimg{_judged(run, kimg)}</figcaption></figure>"
            )
    player = (
        '<div class="player"><button type="button" id="play">Play</button><input type="range" id="at" min="0"'
        f' max="{len(frames) - 1}" value="{len(frames) - 1}" aria-label="Training progress"></div>'
    )
    shown = f'<div><div class="frames">{"".join(frames)}</div>{player}</div>' if frames else ""
    if (run.folder / "reals.png").is_file() and (reals := _picture(run, run.folder / "reals.png")):
        shown += f'<figure><img alt="Real pictures" src="{reals}"><figcaption>Real, from the data</figcaption></figure>'
    hint = '<p class="hint">A place in the grid has the same latents throughout.</p>' if frames else ""
    return _section("Samples", f'{hint}<div class="pictures">{shown}</div>' if shown else "")


def _judged(run: History, kimg: int) -> str:
    """What the evaluation at ``kimg``, rounded down as in the names of grids, found."""
    for name in run.metric_names[:1]:
        for row in run.metrics:
            if row.get(name) is not None and int(row["kimg"]) == kimg:
                return f": {_text(name)} {row[name]:.2f}" + (", the best" if row is run.best(name) else "")
    return ""


def _picture(run: History, path: Path) -> str:
    """As a URL that is the picture itself; empty for a broken file."""
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises both for cut-off files
        run.problems.append(f"{path.name} cannot be read: {error}")
        return ""
    small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    small.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _curves(run: History) -> str:
    if run.kimg <= 0:
        return _section("Curves", "<p>No values were recorded yet.</p>")
    present = dict.fromkeys(name for row in run.metrics for name in row if name not in ("nimg", "kimg"))
    curves = {name: series for name in present if (series := run.series(name)).finite}
    constants = {n: s.finite[0] for n, s in curves.items() if len(set(s.finite)) == 1 and len(s.finite) > 1}
    boxes = []
    for name in run.metric_names:
        best = run.best(name)
        if best is not None:
            boxes.append(_chart(run, name, "Lower is better; the best is circled.", [curves[name]], best["kimg"]))
    named = {name for _, _, names in _CHARTS for name in names} | {*run.metric_names, *_BESIDE}
    rest = [(name, "", (name,)) for name in curves if name not in named]
    for title, hint, names in (*_CHARTS, *rest):
        if wanted := [curves[name] for name in names if name in curves and name not in constants]:
            boxes.append(_chart(run, title, hint, wanted))
    same = ", ".join(f"{name} {value:.4g}" for name, value in constants.items())
    told = f'<p class="hint">The same throughout: {_text(same)}.</p>' if same else ""
    hint = '<p class="hint">Against kimg, thousands of images seen. Point at a curve to read it.</p>'
    return _section("Curves", f'{hint}<div class="charts">{"".join(boxes)}</div>{told}')


def _chart(run: History, title: str, hint: str, series: Sequence[Series], best: float | None = None) -> str:
    keys = "".join(f'<span class="c{i}">{_text(s.name)} <output></output></span>' for i, s in enumerate(series))
    return (
        f'<div><h3>{_text(title)}</h3><div class="hint">{_text(hint)}</div><div class="keys">{keys}</div>'
        f"{chart(series, run.kimg, best, dots=len(series[0].points) <= 40)}</div>"
    )


def _evaluations(run: History) -> str:
    names = run.metric_names
    rows = [row for row in run.metrics if any(name in row for name in names)]
    if not rows:
        return _section("Evaluations", "<p>None was made yet.</p>")
    beside_it = [name for name in _BESIDE if any(name in row for row in rows)]
    bests = [run.best(name) for name in names]
    is_best = [any(row is best for best in bests) for row in rows]
    cells = [
        [f"{row['kimg']:g}", *(_number(row.get(name)) for name in (*names, *beside_it)), "best" if mark else ""]
        for row, mark in zip(rows, is_best, strict=True)
    ]
    table = _table(["kimg", *names, *(_BESIDE[name] for name in beside_it), "best"], cells, "numbers", is_best)
    protocol = next((r["info"].get("metric") for r in reversed(run.records) if r["kind"] == "model"), None) or {}
    how = _table(["Protocol", "value"], [(k, v) for k, v in protocol.items() if k not in ("kimg", "value")])
    details = f"<details><summary>How it was measured</summary>{how}</details>" if protocol else ""
    return _section("Evaluations", table + details)


_BESIDE = {"diversity": "diversity", "d/overfitting": "overfitting", "speed/evaluation_seconds": "seconds"}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _settings(run: History) -> str:
    """What differs from the recipe, first; then everything."""
    flat = _flatten({k: v for k, v in run.config.items() if k not in _SURROUNDINGS})
    if "recipe" not in flat:
        return ""
    known = _recipe(flat)
    if known is None:
        changed = "<p>This version does not know the recipe, so all settings are below.</p>"
    elif rows := [(f"--{_option(k)}", v, known.get(k, "–")) for k, v in flat.items() if known.get(k) != v]:
        changed = _table(["Changed", "here", "recipe"], rows)
    else:
        changed = "<p>All as in the recipe.</p>"
    everything = _table(["Setting", "value"], flat.items())
    return _section("Settings", f"{changed}<details><summary>All settings</summary>{everything}</details>")


_SURROUNDINGS = ("data", "dataset_digest", "mlflow_run_id", "tracking_uri")


def _recipe(flat: Mapping[str, str]) -> dict[str, str] | None:
    """The recipe's own values, those for a CPU or for a GPU, whichever these are closer to; None: unknown."""
    try:
        made = [resolve(flat["recipe"], None, gpu).to_dict() for gpu in (False, True)]
    except UserError:
        return None
    both = [_flatten(json.loads(json.dumps(values))) for values in made]
    return max(both, key=lambda values: sum(values.get(k) == v for k, v in flat.items()))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = f"{value:g}" if type(value) in (int, float) else str(value)
    return flat


def _option(key: str) -> str:
    return key.replace("_", "-")


def _data(run: History) -> str:
    dataset = run.opened.get("dataset")
    if not dataset:
        return ""
    profile = dict(dataset["profile"])
    rows = [
        ("name", dataset["name"]),
        ("from", dataset["source"]["uri"]),
        *((name.replace("_", " "), value) for name, value in profile.items()),
    ]
    return _section("Data", _table(["Data set", "value"], rows))


def _use(run: History) -> str:
    onnx = run.folder / "best" / "gen.onnx"
    if not onnx.is_file():
        return ""
    file = shlex.quote(str(onnx))
    commands = (
        f"catinfer --onnx {file} --n 16 --out cats.png",
        f"catinfer --onnx {file} --n 8 --interpolate walk.gif",
    )
    mebibytes = onnx.stat().st_size / 2**20
    return _section(
        "Use it",
        f"<p>The best generator is one file of {mebibytes:.1f} MiB; <code>best/card.md</code> describes it. It needs"
        f" <code>pip install 'catgan[infer]'</code> and no PyTorch.</p>"
        f"<pre><code>{_text(chr(10).join(commands))}</code></pre>",
    )


def _footer(run: History) -> str:
    tags = run.opened.get("tags", {})
    facts = {
        "catgan": tags.get("catgan.version"),
        "commit": tags.get("mlflow.source.git.commit"),
        "MLflow run": run.config.get("mlflow_run_id"),
        "at": run.config.get("tracking_uri"),
        "report written": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }
    return " · ".join(f"{name} {_text(value)}" for name, value in facts.items() if value)
