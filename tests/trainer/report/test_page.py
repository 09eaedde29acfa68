"""The report of a run: its content, that untrusted text neither runs nor leaks, and its look in a real Chromium."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from catgan.command import UserError
from catgan.dataset import Manifest, Shard, Split
from export.registry import register
from infer.files import encode
from infer.origin import inspect
from infer.provenance import SOURCE_TYPE, in_training
from trainer.cli import main
from trainer.launch.finish import write_final_report
from trainer.recipes import resolve
from trainer.report.charts import Series, chart
from trainer.report.page import write_report
from trainer.tracking.outbox import Outbox
from trainer.tracking.recorder import write_progress
from trainer.tracking.tracker import Tracker, end_run, open_run

pytestmark = pytest.mark.slow

EVIL = "<script>document.title='taken'</script>"
MANIFEST = Manifest(
    root="https://me:secret@host/cats?X-Signature=secret",
    size=32,
    splits={"train": Split((Shard("train-000000.tar", 90, "ab" * 32, 1),)), "val": Split(())},
    seed=0,
    source=("cats.zip",),
    options={},
    tool="test",
)
CURVES = ("loss/generator", "loss/discriminator", "d/real", "d/fake")
DISTANCES = [400.0, 90.0, 40.0, 20.0, 12.5, 14.25]  # at 0, 4, ... 20 kimg

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the system package chromium")


def vast_png() -> bytes:
    """The start of a PNG of 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def train(folder: Path, kimg: float = 20.0) -> Path:
    """The folder of a training that has reached ``kimg`` of 24."""
    config = replace(resolve("dcgan-cpu-32", None, gpu=False), kimg=24.0)
    (folder / "samples").mkdir(parents=True)
    uri, values = "http://me:secret@host:5000", config.to_dict()
    others = {"data": MANIFEST.root, "mlflow_run_id": "0123abcd", "tracking_uri": uri}
    (folder / "config.json").write_text(json.dumps(values | others))
    open_run(folder, uri, "catgan", config=values, manifest=MANIFEST, register=register, offline=True)
    tracker = Tracker(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "reals.png")
    for nimg in range(0, round(kimg * 1000) + 1, 500):
        values = {name: math.sin(nimg / 3000 + i) + rng.normal(0, 0.1) for i, name in enumerate(CURVES)}
        tracker.log_scalars(values | {"lr/generator": 4e-4, "speed/images_per_second": 250.0}, nimg)
        if nimg % 4000 == 0:
            path = folder / "samples" / f"fakes_{nimg // 1000:06d}kimg.png"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
            tracker.log_grid("fakes", nimg, path)
            evaluation = {"fd2k_efflite0": DISTANCES[nimg // 4000], "diversity": 0.5, "speed/evaluation_seconds": 3.0}
            tracker.log_scalars(evaluation, nimg)
    tracker.close()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it only."""
    return train(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def page_of(folder: Path, **options: Any) -> str:
    return write_report(folder, **options).read_text(encoding="utf-8")


def words(page: str) -> str:
    """The visible text of a page."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_command_writes_one_self_contained_file(run_dir: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    target = tmp_path / "a.html"
    assert main(["report", str(run_dir), "-o", str(target)]) == {"report": str(target), "run_dir": str(run_dir)}
    assert sorted(run_dir.rglob("*")) == before
    page = target.read_text()
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert page.count("data:image/webp;base64,") == 7  # six grids and the real images
    assert main(["report", str(run_dir)])["report"] == str(run_dir / "report.html")


def test_the_content_of_the_page(run_dir: Path) -> None:
    tracker = Tracker(run_dir)
    tracker.note("rollback", "loss not finite, back to 12 kimg", 13_000)
    tracker.close()
    page = page_of(run_dir)
    text = words(page)
    for part in (
        "mine unfinished dcgan-cpu-32. Still training, or interrupted.",
        "fd2k_efflite0 12.50 best, at 16 kimg; lower is better",
        "Images seen 20 kimg of 24",
        "loss not finite, back to 12 kimg (rollback, 13 kimg)",
        "--kimg 24 100",  # here, and in the recipe
        "train images 90",
        "Generated images at 16 kimg: fd2k_efflite0 12.50 (best)",
        "Constant: lr/generator 0.0004, speed/images_per_second 250, diversity 0.5",
    ):
        assert part in text, part
    (best,) = re.findall(r'<tr class="best">.*?</tr>', page)
    assert words(best) == "16 12.50 0.500 3.000 best"
    assert page.count('class="best"') - 1 == 1  # in the table, and circled in the chart
    assert "Changed" in text
    assert "--batch" not in text


def test_the_commands_that_generate_have_a_line_each(run_dir: Path) -> None:
    (run_dir / "best").mkdir(exist_ok=True)
    (run_dir / "best" / "gen.onnx").write_bytes(b"not read")
    (commands,) = re.findall(r"<pre[^>]*><code>(catinfer.*?)</code></pre>", page_of(run_dir), re.DOTALL)
    assert [line.split()[:2] for line in commands.splitlines()] == [["catinfer", "--onnx"]] * 2


def test_the_end_of_a_run_is_reported(run_dir: Path) -> None:
    write_final_report(run_dir, "FINISHED")
    page = (run_dir / "report.html").read_text()
    assert "mine finished dcgan-cpu-32." in words(page)
    last = [record for record, _ in Outbox(run_dir).journal.read()][-1]
    assert (last["kind"], last["path"], last["folder"]) == ("artifact", "report.html", None)
    end_run(run_dir, "", "KILLED", offline=True, register=register)
    assert "mine stopped dcgan-cpu-32." in words(page_of(run_dir))


def test_a_report_that_cannot_be_written_is_a_warning(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "report.html").mkdir()
    write_final_report(run_dir, "FINISHED")
    assert "warning: no report:" in capsys.readouterr().err
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []


def test_runs_with_few_files(trained: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    shutil.copyfile(trained / "config.json", started / "config.json")
    text = words(page_of(started))
    assert "No metrics yet." in text
    assert "No evaluation yet." in text

    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copyfile(trained / "metrics.jsonl", copied / "metrics.jsonl")
    assert "fd2k_efflite0 12.50 best, at 16 kimg" in words(page_of(copied))

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UserError, match="is not a run: it has none of"):
            write_report(folder)


def test_files_of_a_killed_run(run_dir: Path) -> None:
    intact = page_of(run_dir)
    for name in ("metrics.jsonl", "outbox.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"nimg": 20500, "kimg": 20.5, "loss/gen')
    with (run_dir / "metrics.jsonl").open("r+") as file:
        lines = file.readlines()
        lines[3] = json.dumps(json.loads(lines[3]) | {"loss/generator": None}) + "\n"  # not a number
        file.seek(0)
        file.truncate()
        file.writelines(lines)
    grid = run_dir / "samples" / "fakes_000008kimg.png"
    os.truncate(grid, grid.stat().st_size // 2)
    damaged = page_of(run_dir)
    assert "fakes_000008kimg.png cannot be read" in words(damaged)
    grid.write_bytes(vast_png())
    damaged = page_of(run_dir)
    assert "fakes_000008kimg.png cannot be read" in words(damaged)
    assert damaged.count("data:image/webp;base64,") == intact.count("data:image/webp;base64,") - 1
    assert damaged.count("<polyline") == intact.count("<polyline") + 1  # the curve has a gap
    assert "fd2k_efflite0 12.50 best" in words(damaged)

    (run_dir / "config.json").write_text('{"kimg": ')
    with pytest.raises(UserError, match="is damaged"):
        write_report(run_dir)


def test_untrusted_text_neither_runs_nor_leaks(run_dir: Path, tmp_path: Path) -> None:
    """Names, settings and notes are escaped, without passwords and signatures of URLs."""
    config = json.loads((run_dir / "config.json").read_text())
    config["track"]["experiment"] = EVIL
    config["recipe"] = EVIL
    config["loader"]["cache"] = "caf\udce9\r/\x1b[2J"  # a path that is not UTF-8
    (run_dir / "config.json").write_text(json.dumps(config))
    tracker = Tracker(run_dir)
    tracker.note("save", f'{EVIL} at s3://key:secret@bucket/x?token=secret" onload="alert(1)', 0)
    tracker.log_scalars({f'evil"{EVIL}': 1.0, f"fd2k_{'x' * 3}": 3.0}, 20_000)
    tracker.log_scalars({f'evil"{EVIL}': 2.0}, 20_500)
    tracker.close()
    run_dir.rename(tmp_path / EVIL.replace("/", ":"))
    page = page_of(tmp_path / EVIL.replace("/", ":"))
    assert page.count("<script>") == page.count("</script>") == 1
    assert 'onload="' not in page
    assert "&lt;script&gt;" in page
    assert "secret" not in page
    assert "s3://bucket/x" in page
    assert r"caf\xe9\r/\x1b[2J" in page


def test_long_trainings_have_few_points_and_grids(tmp_path: Path) -> None:
    points = [(i / 10, 1.0 + i % 2) for i in range(5000)]
    svg = chart([Series("a", points)], 500.0)
    (line,) = re.findall(r'<polyline points="([^"]*)"', svg)
    assert 200 < len(line.split()) <= 300

    (tmp_path / "samples").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for kimg in range(130):
        Image.new("RGB", (8, 8), (kimg, 0, 0)).save(tmp_path / "samples" / f"fakes_{kimg:06d}kimg.png")
    shown = re.findall(r"Generated images at (\d+) kimg<", page_of(tmp_path))
    assert (len(shown), shown[0], shown[-1]) == (60, "0", "129")


def test_copies_of_generated_images_in_the_page_say_so(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.json").write_text("{}")
    pixels = np.zeros((8, 8, 3), np.uint8)
    (tmp_path / "samples" / "fakes_000000kimg.png").write_bytes(encode(pixels, ".png", in_training()))
    (tmp_path / "reals.png").write_bytes(encode(pixels, ".png"))
    embedded = re.findall(r"data:image/webp;base64,([\w+/=]+)", page_of(tmp_path))
    marked = [SOURCE_TYPE.encode() in base64.b64decode(image) for image in embedded]
    assert sorted(marked) == [False, True]


def test_animations_of_the_grids(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av", reason="needs the extra catgan[video]")
    assert [path.name for path in write_progress(run_dir)] == ["progress.gif", "progress.mp4"]
    with Image.open(run_dir / "progress.gif") as gif:
        assert gif.n_frames == 6
    with av.open(str(run_dir / "progress.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        seconds = float(video.duration / av.time_base)
    records = inspect([str(run_dir / "progress.gif"), str(run_dir / "progress.mp4")])["files"]
    assert [(record["digital_source_type"], record["kind"]) for record in records] == [(SOURCE_TYPE, "training")] * 2
    assert abs(seconds - (5 * 0.4 + 2.5)) < 0.1
    for frame, kimg in ((0, 0), (-1, 20)):  # noise, which is not encoded exactly
        grid = np.asarray(Image.open(run_dir / "samples" / f"fakes_{kimg:06d}kimg.png"))
        assert np.corrcoef(frames[frame].mean(2).ravel(), grid.mean(2).ravel())[0, 1] > 0.7

    (run_dir / "progress.mp4").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [path.name for path in write_progress(run_dir)] == ["progress.gif"]
    assert not (run_dir / "progress.mp4").exists()


def test_a_damaged_grid_is_left_out_of_the_animation(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = sorted((run_dir / "samples").glob("*.png"))
    cut(grids[0])
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    data = bytearray(encode(noise, ".png"))
    data[65536:69632] = bytes(4096)  # a block of a file system that was lost, of which Pillow raises a SyntaxError
    grids[1].write_bytes(data)
    write_progress(run_dir)
    with Image.open(run_dir / "progress.gif") as gif:
        assert gif.n_frames == len(grids) - 2
    lines = capsys.readouterr().err.splitlines()
    assert [str(path) in line for path, line in zip(grids, lines, strict=False)] == [True, True]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plotted(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", svg)]


def ticks(svg: str) -> dict[float, float]:
    """Values of the vertical axis by height."""
    found = re.findall(r'<text class="value" x="\d+" y="([\d.]+)">([^<]*)</text>', svg)
    return {float(y) - 4: float(value.removesuffix("k")) * (1000 if value.endswith("k") else 1) for y, value in found}


def test_differences_below_half_a_per_cent_are_flat() -> None:
    heights = [y for _, y in plotted(chart([Series("a", [(0.0, 99.9), (1.0, 100.0)])], 1.0))]
    assert abs(heights[0] - heights[1]) < 1


@pytest.mark.parametrize(
    "values",
    [
        *([0.0, 1.0, 0.5], [-3.0, 7.0], [5.0, 5.0], [0.0, 0.0], [2e-4, 5e-5], [1e6, 3e6], [400.0, 10.0, 20.0]),
        *([1e-4, 1e4], [12_300.0, 12_450.0], [-25_000.0, 0.0]),
    ],
)
def test_points_agree_with_the_axis(values: list[float]) -> None:
    """Heights are those of linear interpolation between ticks, or between their logarithms."""
    svg = chart([Series("a", [(float(i), value) for i, value in enumerate(values)])], float(len(values) - 1))
    heights, marks = np.array(list(ticks(svg))), np.array(list(ticks(svg).values()))
    assert 2 <= len(marks) <= 12
    scale = np.log if "data-log" in svg else np.asarray
    for (_, y), value in zip(plotted(svg), values, strict=True):
        assert marks.min() <= value <= marks.max()
        expected = np.interp(scale(value), scale(marks), heights)
        assert abs(y - expected) < 0.3
    xs = [x for x, _ in plotted(svg)]
    np.testing.assert_allclose(np.diff(xs), (xs[-1] - xs[0]) / (len(xs) - 1), atol=0.11)


@pytest.fixture
def browser_page(run_dir: Path) -> Iterator[Page]:
    """The report of a run with an evil name. Afterwards: no errors, and no requests."""
    run_dir = run_dir.rename(run_dir.with_name(EVIL.replace("/", ":")))
    report = write_report(run_dir, run_dir.with_name("report.html"))
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        yield page
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("data:", report.as_uri()))] == []


@needs_chromium
def test_on_a_phone_in_a_real_browser(browser_page: Page) -> None:
    page = browser_page
    assert page.title() == f"{EVIL.replace('/', ':')} – report"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320

    assert page.locator(".frames img:visible").count() == 1
    assert page.locator(".frames img:visible").get_attribute("alt") == "Generated images at 20 kimg"
    page.focus("#at")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".frames img:visible").get_attribute("alt") == "Generated images at 16 kimg"
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 64)")

    # The slider marks its position in each chart and shows the values there.
    metric = page.locator(".charts > div").first
    assert metric.locator("output").inner_text() == "12.5"
    curve = metric.locator("polyline").bounding_box()
    assert curve is not None
    assert min(curve["width"], curve["height"]) > 50
    metric.locator("svg").scroll_into_view_if_needed()
    box = metric.locator("svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 46 / 400, box["y"] + box["height"] / 2)  # the left end of the axis
    assert metric.locator("output").inner_text() == "400"

    page.click("#play")
    assert page.locator("#play").inner_text() == "Stop"
    page.locator("#play", has_text="Play").wait_for()
    assert page.locator(".frames img:visible").get_attribute("alt") == "Generated images at 20 kimg"


@needs_chromium
def test_axe_finds_no_accessibility_violation(browser_page: Page) -> None:
    found = Axe().run(browser_page)
    assert found.violations_count == 0, found.generate_report()
