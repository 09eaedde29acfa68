"""The report of a run: one HTML file that needs no server, no network and no other file.

It is written from the run's folder: ``config.json``, ``metrics.jsonl``, sample grids, and the records for MLflow in
``outbox.jsonl``. Each may be missing, since a run may have just started or been interrupted.

Names and messages on the page are untrusted. ``_text`` escapes them and removes passwords and signatures from URLs, and
the page's content security policy allows no script but its own.
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
from catgan.text import printable
from trainer.recipes import resolve
from trainer.report.charts import Series, chart
from trainer.report.history import History, read
from trainer.tracking.messages import redact

NAME = "report.html"

_MAX_GRIDS = 60  # that the slider steps through
_MAX_PIXELS = 768  # of a grid's longer side
_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}

# Title, hint, and the curves of a chart. A curve that is in none of them gets a chart of its own.
_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "Neither should diverge; they do not measure quality.", ("loss/generator", "loss/discriminator")),
    (
        "Discriminator output",
        "Mean logits of real and generated images, and of the train and val splits.",
        ("d/real", "d/fake", "d/train", "d/val"),
    ),
    (
        "Collapse and overfitting",
        "Diversity near 0: mode collapse. Overfitting near 1: training images are memorised.",
        ("diversity", "d/overfitting", "d/sign"),
    ),
    ("Penalties", "A small share of the discriminator's loss.", ("loss/r1r2", "loss/gp")),
    ("Learning rates", "They follow the recipe's schedules.", ("lr/generator", "lr/discriminator")),
    ("Speed", "Images per second while training.", ("speed/images_per_second",)),
    (
        "Overhead",
        "Shares of time spent waiting for images and evaluating.",
        ("speed/data_wait", "speed/evaluation_share"),
    ),
    (
        "Utilisation",
        "Per cent, of the first machine's processor and GPU. A GPU far below 100 waits for images or for Python.",
        (
            "system/cpu_utilization_percentage",
            "system/gpu_0_utilization_percentage",
            "system/node_0/cpu_utilization_percentage",
            "system/node_0/gpu_0_utilization_percentage",
        ),
    ),
)
# Values in the table of evaluations besides the metrics, and their headings; they get no chart of their own.
_COLUMNS = {"diversity": "diversity", "d/overfitting": "overfitting", "speed/evaluation_seconds": "seconds"}
# Keys of config.json that are not settings.
_NOT_SETTINGS = ("data", "dataset_digest", "mlflow_run_id", "tracking_uri")


def write_report(run_dir: Path, path: Path | None = None, status: str | None = None) -> Path:
    """Write the report of the run in the folder ``run_dir``.

    Args:
        path: default: ``report.html`` in the run's folder.
        status: FINISHED, FAILED or KILLED, if the run's end is not recorded yet; default: the recorded status.

    Returns:
        The path.

    Raises:
        UserError: ``run_dir`` is not a run, a file is damaged, or ``path`` cannot be written.
    """
    path = path or run_dir / NAME
    page = _page(read(run_dir, status))
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _page(run: History) -> str:
    web = resources.files("trainer.report") / "web"
    style, script = ((web / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    samples, unreadable = _samples(run)
    sections = [_facts(run), _warnings(run, unreadable), samples]
    sections += [section(run) for section in (_curves, _evaluations, _settings, _data, _usage)]
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


# Sections, in their order on the page. An empty string leaves one out.


def _headline(run: History) -> str:
    status = _STATUS.get(run.status or "", "unfinished")
    recipe = run.config.get("recipe", "unknown recipe")
    hint = "" if run.status else " Still training, or interrupted."
    return f'<span class="badge {status}">{status}</span> {_text(recipe)}.{hint}'


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
        start = datetime.datetime.fromtimestamp(run.records[0]["time"] / 1000, datetime.UTC)
        facts.append(("Duration", _duration(run.seconds), f"started {start:%Y-%m-%d %H:%M} UTC"))
    items = "".join(f"<div><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{items}</dl>'


def _warnings(run: History, unreadable: Sequence[str]) -> str:
    lines = [
        f"<li>{_text(r['text'])} <time>({_text(r['note'])}, {r['nimg'] / 1000:g} kimg)</time></li>"
        for r in run.records
        if r["kind"] == "note"
    ]
    lines += [f"<li>{_text(problem)}</li>" for problem in unreadable]
    return _section("Warnings", f"<ul>{''.join(lines)}</ul>" if lines else "", "warnings")


def _samples(run: History) -> tuple[str, list[str]]:
    """Grids of generated images with a slider, and real images; and messages about the files that cannot be read."""
    paths = sorted((run.folder / "samples").glob("fakes_*kimg.png"))
    count = min(len(paths), _MAX_GRIDS)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    frames, unreadable = [], []
    for path in chosen:
        try:
            url = _image_url(path)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        kimg = int("".join(filter(str.isdigit, path.stem)) or 0)
        frames.append(
            f'<figure data-kimg="{kimg}"><img alt="Generated images at {kimg} kimg" src="{url}">'
            f"<figcaption>Generated images at {kimg} kimg{_metric_at(run, kimg)}</figcaption></figure>"
        )
    hint = body = ""
    if frames:
        hint = '<p class="hint">By the EMA generator; each position in the grid has the same latent throughout.</p>'
        body = (
            f'<div><div class="frames">{"".join(frames)}</div>'
            '<div class="player"><button type="button" id="play">Play</button><input type="range" id="at" min="0"'
            f' max="{len(frames) - 1}" value="{len(frames) - 1}" aria-label="Training progress"></div></div>'
        )
    if (reals := run.folder / "reals.png").is_file():
        try:
            caption = "<figcaption>Real images from the data set</figcaption>"
            body += f'<figure><img alt="Real images" src="{_image_url(reals)}">{caption}</figure>'
        except ValueError as error:
            unreadable.append(str(error))
    return _section("Samples", f'{hint}<div class="samples">{body}</div>' if body else ""), unreadable


def _metric_at(run: History, kimg: int) -> str:
    """The metric at ``kimg``, rounded down as in the names of grids; empty if it was not evaluated there."""
    for name in run.metric_names[:1]:
        for row in run.metrics:
            if row.get(name) is not None and int(row["kimg"]) == kimg:
                return f": {_text(name)} {row[name]:.2f}" + (" (best)" if row is run.best(name) else "")
    return ""


def _curves(run: History) -> str:
    if run.kimg <= 0:
        return _section("Curves", "<p>No metrics yet.</p>")
    present = dict.fromkeys(name for row in run.metrics for name in row if name not in ("nimg", "kimg"))
    curves = {name: series for name in present if (series := run.series(name)).finite}
    constants = {n: s.finite[0] for n, s in curves.items() if len(set(s.finite)) == 1 and len(s.finite) > 1}
    boxes = []
    for name in run.metric_names:
        best = run.best(name)
        if best is not None:
            boxes.append(_chart(run, name, "Lower is better; the best is circled.", [curves[name]], best["kimg"]))
    listed = {name for _, _, names in _CHARTS for name in names} | {*run.metric_names, *_COLUMNS}
    others = [(name, "", (name,)) for name in curves if name not in listed]
    for title, hint, names in (*_CHARTS, *others):
        if shown := [curves[name] for name in names if name in curves and name not in constants]:
            boxes.append(_chart(run, title, hint, shown))
    values = ", ".join(f"{name} {value:.4g}" for name, value in constants.items())
    constant = f'<p class="hint">Constant: {_text(values)}.</p>' if values else ""
    hint = '<p class="hint">Over kimg, thousands of images seen. Point at a curve for its values.</p>'
    return _section("Curves", f'{hint}<div class="charts">{"".join(boxes)}</div>{constant}')


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
        return _section("Evaluations", "<p>No evaluation yet.</p>")
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    bests = [run.best(name) for name in names]
    is_best = [any(row is best for best in bests) for row in rows]
    cells = [
        [f"{row['kimg']:g}", *(_number(row.get(name)) for name in (*names, *columns)), "best" if mark else ""]
        for row, mark in zip(rows, is_best, strict=True)
    ]
    table = _table(["kimg", *names, *(_COLUMNS[name] for name in columns), "best"], cells, "numbers", is_best)
    protocol = next((r["info"].get("metric") for r in reversed(run.records) if r["kind"] == "model"), None) or {}
    settings = _table(["Protocol", "value"], [(k, v) for k, v in protocol.items() if k not in ("kimg", "value")])
    details = f"<details><summary>Protocol of the best generator's metric</summary>{settings}</details>"
    return _section("Evaluations", table + (details if protocol else ""))


def _settings(run: History) -> str:
    """The settings that differ from the recipe, then all."""
    flat = _flatten({k: v for k, v in run.config.items() if k not in _NOT_SETTINGS})
    if "recipe" not in flat:
        return ""
    recipe = _recipe(flat)
    if recipe is None:
        changed = "<p>This version of catgan does not know the recipe; all settings are below.</p>"
    elif rows := [(f"--{k.replace('_', '-')}", v, recipe.get(k, "–")) for k, v in flat.items() if recipe.get(k) != v]:
        changed = _table(["Changed", "this run", "recipe"], rows)
    else:
        changed = "<p>All as in the recipe.</p>"
    everything = _table(["Setting", "value"], flat.items())
    return _section("Settings", f"{changed}<details><summary>All settings</summary>{everything}</details>")


def _recipe(flat: Mapping[str, str]) -> dict[str, str] | None:
    """The recipe's own settings, for a CPU or for a GPU, whichever differ less from ``flat``; None: unknown recipe."""
    try:
        configs = [resolve(flat["recipe"], None, gpu).to_dict() for gpu in (False, True)]
    except UserError:
        return None
    both = [_flatten(json.loads(json.dumps(values))) for values in configs]
    return max(both, key=lambda values: sum(values.get(k) == v for k, v in flat.items()))


def _data(run: History) -> str:
    dataset = run.opened.get("dataset")
    if not dataset:
        return ""
    profile = ((name.replace("_", " "), value) for name, value in dataset["profile"].items())
    rows = [("name", dataset["name"]), ("location", dataset["source"]["uri"]), *profile]
    return _section("Data", _table(["Data set", "value"], rows))


def _usage(run: History) -> str:
    onnx = run.folder / "best" / "gen.onnx"
    if not onnx.is_file():
        return ""
    file = shlex.quote(str(onnx))
    commands = (
        f"catinfer --onnx {file} --n 16 --out cats.png",
        f"catinfer --onnx {file} --n 8 --interpolate walk.gif",
    )
    lines = "\n".join(map(_text, commands))
    mebibytes = onnx.stat().st_size / 2**20
    return _section(
        "Generate images",
        f"<p>The best generator is one file of {mebibytes:.1f} MiB, described in <code>best/card.md</code>. It needs"
        f" <code>pip install 'catgan[infer]'</code> and no PyTorch.</p>"
        f"<pre><code>{lines}</code></pre>",
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


# Parts of sections.


def _text(value: object) -> str:
    """``value`` as text that is safe anywhere in HTML, attributes included."""
    return escape(printable(without_queries(redact(str(value)))))


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>' if body else ""


def _table(head: Sequence[str], rows: Collection[Sequence[object]], kind: str = "", best: Sequence[bool] = ()) -> str:
    """A table of text. Rows for which ``best`` is true are highlighted."""
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


def _image_url(path: Path) -> str:
    """A data URL of the image, reduced to ``_MAX_PIXELS``.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises both for truncated files
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    small.thumbnail((_MAX_PIXELS, _MAX_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=85, xmp=small.info.get("xmp", b""))  # says of generated images that they are
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": [1, 2.0]}}`` -> ``{"a.b": "1 2.0"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = f"{value:g}" if type(value) in (int, float) else str(value)
    return flat


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _hash(content: str) -> str:
    """The hash of an inline style or script for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
