"""The report of a run: one HTML file that needs no server, no network and no other file.

It is written from the run's folder: ``config.json``, ``metrics.jsonl``, sample grids, and the records for MLflow in
``outbox.jsonl``. Each may be missing, since a run may have just started or been interrupted.

Names and messages on the page are untrusted, see ``markup``.
"""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from catgan.command import UserError
from catgan.files import atomic_open
from trainer.recipes import resolve
from trainer.report.charts import Series, chart
from trainer.report.favourites import favourites
from trainer.report.history import History, flatten, read
from trainer.report.markup import document, duration, image_url, number, section, table, text, timestamp

NAME = "report.html"

_MAX_GRIDS = 60  # that the slider steps through
_MAX_PIXELS = 768  # of a grid's longer side

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
    ("Penalties", "A small share of the discriminator's loss.", ("loss/r1r2", "loss/gp", "loss/path_length")),
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


def write_report(run_dir: Path, path: Path | None = None, status: str | None = None, neighbours: bool = False) -> Path:
    """Write the report of the run in the folder ``run_dir``.

    Args:
        path: default: ``report.html`` in the run's folder.
        status: FINISHED, FAILED or KILLED, if the run's end is not recorded yet; default: the recorded status.
        neighbours: also show the training images nearest to generated ones, see ``trainer.report.neighbours``. It takes
            as long as computing the features of all training images.

    Returns:
        The path.

    Raises:
        UserError: ``run_dir`` is not a run, a file is damaged, or ``path`` cannot be written.
    """
    path = path or run_dir / NAME
    run = read(run_dir, status)
    nearest = ""
    if neighbours:
        from trainer.report.neighbours import neighbours_section  # on use: it imports the metric networks

        nearest = neighbours_section(run)
    page = _page(run, nearest)
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _page(run: History, neighbours: str) -> str:
    samples, unreadable = _samples(run)
    sections = [_facts(run), _warnings(run, unreadable), samples, neighbours]
    sections += [write(run) for write in (_curves, _evaluations, _settings, _data, _usage)]
    return document(
        run.folder.resolve().name,
        _headline(run),
        sections,
        _footer(run),
        styles=("report.css",),
        scripts=("charts.js", "report.js", "favourites.js"),
    )


# Sections, in their order on the page. An empty string leaves one out.


def _headline(run: History) -> str:
    recipe = run.config.get("recipe", "unknown recipe")
    hint = "" if run.status else " Still training, or interrupted."
    return f'<span class="badge {run.state}">{run.state}</span> {text(recipe)}.{hint}'


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
        facts.append(("Duration", duration(run.seconds), f"started {timestamp(start)}"))
    items = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{items}</dl>'


def _warnings(run: History, unreadable: Sequence[str]) -> str:
    lines = [
        f"<li>{text(r['text'])} <time>({text(r['note'])}, {r['nimg'] / 1000:g} kimg)</time></li>"
        for r in run.records
        if r["kind"] == "note"
    ]
    lines += [f"<li>{text(problem)}</li>" for problem in unreadable]
    return section("Warnings", f"<ul>{''.join(lines)}</ul>" if lines else "", "warnings")


def _samples(run: History) -> tuple[str, list[str]]:
    """Grids of generated images with a slider, and real images; and messages about the files that cannot be read."""
    paths = sorted((run.folder / "samples").glob("fakes_*kimg.png"))
    count = min(len(paths), _MAX_GRIDS)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    frames: list[str] = []
    unreadable: list[str] = []
    latest = None
    for path in chosen:
        try:
            url = image_url(path, _MAX_PIXELS)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        kimg = int("".join(filter(str.isdigit, path.stem)) or 0)
        latest = path, kimg
        frames.append(
            f'<figure data-kimg="{kimg}"><img alt="Generated images at {kimg} kimg" src="{url}">'
            f"<figcaption>Generated images at {kimg} kimg{_metric_at(run, kimg)}</figcaption></figure>"
        )
    hint = body = ""
    if latest is not None:
        hint = '<p class="hint">By the EMA generator; each position in the grid has the same latent throughout.</p>'
        body = (
            f'<div><div class="frames">{"".join(frames)}</div>'
            '<div class="player"><button type="button" id="play">Play</button><input type="range" id="at" min="0"'
            f' max="{len(frames) - 1}" value="{len(frames) - 1}" aria-label="Training progress"></div></div>'
        )
        body += favourites(run, *latest)
    if (reals := run.folder / "reals.png").is_file():
        try:
            caption = "<figcaption>Real images from the data set</figcaption>"
            body += f'<figure><img alt="Real images" src="{image_url(reals, _MAX_PIXELS)}">{caption}</figure>'
        except ValueError as error:
            unreadable.append(str(error))
    return section("Samples", f'{hint}<div class="samples">{body}</div>' if body else ""), unreadable


def _metric_at(run: History, kimg: int) -> str:
    """The metric at ``kimg``, rounded down as in the names of grids; empty if it was not evaluated there."""
    for name in run.metric_names[:1]:
        for row in run.metrics:
            if row.get(name) is not None and int(row["kimg"]) == kimg:
                return f": {text(name)} {row[name]:.2f}" + (" (best)" if row is run.best(name) else "")
    return ""


def _curves(run: History) -> str:
    if run.kimg <= 0:
        return section("Curves", "<p>No metrics yet.</p>")
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
    constant = f'<p class="hint">Constant: {text(values)}.</p>' if values else ""
    hint = '<p class="hint">Over kimg, thousands of images seen. Point at a curve for its values.</p>'
    return section("Curves", f'{hint}<div class="charts">{"".join(boxes)}</div>{constant}')


def _chart(run: History, title: str, hint: str, series: Sequence[Series], best: float | None = None) -> str:
    keys = "".join(f'<span class="c{i}">{text(s.name)} <output></output></span>' for i, s in enumerate(series))
    return (
        f'<div><h3>{text(title)}</h3><div class="hint">{text(hint)}</div><div class="keys">{keys}</div>'
        f"{chart(series, run.kimg, best, dots=len(series[0].points) <= 40)}</div>"
    )


def _evaluations(run: History) -> str:
    names = run.metric_names
    rows = [row for row in run.metrics if any(name in row for name in names)]
    if not rows:
        return section("Evaluations", "<p>No evaluation yet.</p>")
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    bests = [run.best(name) for name in names]
    is_best = [any(row is best for best in bests) for row in rows]
    cells = [
        [f"{row['kimg']:g}", *(number(row.get(name)) for name in (*names, *columns)), "best" if mark else ""]
        for row, mark in zip(rows, is_best, strict=True)
    ]
    evaluations = table(["kimg", *names, *(_COLUMNS[name] for name in columns), "best"], cells, "numbers", is_best)
    protocol = next((r["info"].get("metric") for r in reversed(run.records) if r["kind"] == "model"), None) or {}
    settings = table(["Protocol", "value"], [(k, v) for k, v in protocol.items() if k not in ("kimg", "value")])
    details = f"<details><summary>Protocol of the best generator's metric</summary>{settings}</details>"
    return section("Evaluations", evaluations + (details if protocol else ""))


def _settings(run: History) -> str:
    """The settings that differ from the recipe, then all."""
    flat = run.settings
    if "recipe" not in flat:
        return ""
    recipe = _recipe(flat)
    if recipe is None:
        changed = "<p>This version of catgan does not know the recipe; all settings are below.</p>"
    elif rows := [(f"--{k.replace('_', '-')}", v, recipe.get(k, "–")) for k, v in flat.items() if recipe.get(k) != v]:
        changed = table(["Changed", "this run", "recipe"], rows)
    else:
        changed = "<p>All as in the recipe.</p>"
    everything = table(["Setting", "value"], flat.items())
    return section("Settings", f"{changed}<details><summary>All settings</summary>{everything}</details>")


def _recipe(flat: Mapping[str, str]) -> dict[str, str] | None:
    """The recipe's own settings, for a CPU or for a GPU, whichever differ less from ``flat``; None: unknown recipe."""
    try:
        configs = [resolve(flat["recipe"], None, gpu).to_dict() for gpu in (False, True)]
    except UserError:
        return None
    both = [flatten(json.loads(json.dumps(values))) for values in configs]
    return max(both, key=lambda values: sum(values.get(k) == v for k, v in flat.items()))


def _data(run: History) -> str:
    dataset = run.opened.get("dataset")
    if not dataset:
        return ""
    profile = ((name.replace("_", " "), value) for name, value in dataset["profile"].items())
    rows = [("name", dataset["name"]), ("location", dataset["source"]["uri"]), *profile]
    return section("Data", table(["Data set", "value"], rows))


def _usage(run: History) -> str:
    onnx = run.folder / "best" / "gen.onnx"
    if not onnx.is_file():
        return ""
    file = shlex.quote(str(onnx))
    commands = (
        f"catinfer --onnx {file} --n 16 --out cats.png",
        f"catinfer --onnx {file} --n 8 --interpolate walk.gif",
    )
    lines = "\n".join(map(text, commands))
    mebibytes = onnx.stat().st_size / 2**20
    return section(
        "Generate images",
        f"<p>The best generator is one file of {mebibytes:.1f} MiB, described in <code>best/card.md</code>. It needs"
        f" <code>pip install 'catgan[infer]'</code> and no PyTorch.</p>"
        f'<pre tabindex="0" role="region" aria-label="Commands"><code>{lines}</code></pre>',
    )


def _footer(run: History) -> str:
    tags = run.opened.get("tags", {})
    facts = {
        "catgan": tags.get("catgan.version"),
        "commit": tags.get("mlflow.source.git.commit"),
        "MLflow run": run.config.get("mlflow_run_id"),
        "at": run.config.get("tracking_uri"),
        "report written": timestamp(datetime.datetime.now(datetime.UTC)),
    }
    return " · ".join(f"{name} {text(value)}" for name, value in facts.items() if value)
