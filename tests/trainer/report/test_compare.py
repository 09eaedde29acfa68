"""The comparison of runs: its content, what is refused, and its look in a real Chromium."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from catgan.command import UserError
from trainer.cli import main
from trainer.recipes import resolve
from trainer.report.history import read

pytestmark = pytest.mark.slow

EVIL = "<script>document.title='taken'</script>"
METRIC = "fd2k_efflite0"

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the system package chromium")


def train(
    folder: Path, grids: dict[int, float], *, digest: str = "ab" * 32, metric: str = METRIC, **config: Any
) -> Path:
    """The folder of a run that wrote a grid and a metric's value at each kimg of ``grids``, two minutes apart."""
    (folder / "samples").mkdir(parents=True)
    settings = json.loads(json.dumps(resolve("dcgan-cpu-32", None, gpu=False).to_dict())) | config
    (folder / "config.json").write_text(json.dumps(settings | {"data": "cats", "dataset_digest": digest}))
    opened = {"kind": "open", "time": 0, "params": {"eval.num": "2048"}, "dataset": {"digest": digest}}
    records: list[dict[str, Any]] = [opened]
    rows = []
    for i, (kimg, value) in enumerate(grids.items(), 1):
        values = {metric: value, "diversity": 0.5, "loss/generator": float(i), "d/real": -float(i)}
        records.append({"kind": "scalars", "time": 120_000 * i, "nimg": kimg * 1000, "values": values})
        rows.append({"nimg": kimg * 1000, "kimg": float(kimg), **values})
        Image.new("RGB", (64, 64), (2 * kimg, 0, 0)).save(folder / "samples" / f"fakes_{kimg:06d}kimg.png")
    for name, lines in (("outbox.jsonl", records), ("metrics.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compared(*folders: Path, out: Path) -> str:
    main(["report", *map(str, folders), "-o", str(out)])
    return out.read_text(encoding="utf-8")


def words(page: str) -> str:
    """The visible text of a page."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def rows_of(page: str, title: str) -> list[list[str]]:
    (part,) = re.findall(rf"<h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in re.findall(r"<tr.*?</tr>", part)]


def test_the_command_writes_one_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = train(tmp_path / "runs" / "a", {0: 9.0}), train(tmp_path / "runs" / "b", {0: 8.0})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted((tmp_path / "runs").rglob("*"))
    result = main(["report", str(one), str(other)])
    assert result == {"report": "compare.html", "run_dirs": [str(one), str(other)]}
    assert [path.name for path in Path().iterdir()] == ["compare.html"]
    assert sorted((tmp_path / "runs").rglob("*")) == before
    assert re.findall(r"(?:src|href)=\"(?!data:)", Path("compare.html").read_text()) == []


def test_options_best_values_and_cost(tmp_path: Path) -> None:
    one = train(tmp_path / "a", {0: 90.0, 4: 20.0, 8: 25.0}, kimg=24.0)
    other = train(tmp_path / "b", {0: 95.0, 8: 30.0}, kimg=24.0, batch=7)
    page = compared(one, other, out=tmp_path / "c.html")
    assert rows_of(page, "Options that differ") == [["Option", "a", "b"], ["--batch", "16", "7"]]
    head, *rows = rows_of(page, "Best values and cost")
    assert head == ["Run", f"best {METRIC}", "kimg", "time", "recipe", "status", "data set"]
    assert rows == [
        ["a", "20.00 at 4 kimg", "8 of 24", "6 min", "dcgan-cpu-32", "unfinished", "abababababab"],
        ["b", "30.00 at 8 kimg", "8 of 24", "4 min", "dcgan-cpu-32", "unfinished", "abababababab"],
    ]
    (best,) = re.findall(r'<tr class="best">.*?</tr>', page)
    assert words(best).startswith("a ")
    assert "Warnings" not in words(page)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"digest": "cd" * 32}, "The data sets differ, .* digest abababababab: a; digest cdcdcdcdcdcd: b."),
        ({"metric": "fd2k_opennsfw"}, "The metric networks differ, .* efflite0: a; opennsfw: b."),
        ({"metric": "fid2k"}, "The metric networks differ, .* efflite0: a; inception: b."),
        ({"metric": "fd5k_efflite0"}, "The metrics differ, .* fd2k_efflite0: a; fd5k_efflite0: b."),
    ],
)
def test_distances_that_do_not_compare(changes: dict[str, str], warning: str, tmp_path: Path) -> None:
    one, other = train(tmp_path / "a", {0: 9.0}), train(tmp_path / "b", {0: 8.0}, **changes)
    page = compared(one, other, out=tmp_path / "c.html")
    assert re.search(warning, words(page))
    assert words(page).count("not comparable") == 1
    assert '<tr class="best">' not in page


def test_numbers_of_images_and_weights_of_the_network(tmp_path: Path) -> None:
    one, other = train(tmp_path / "a", {0: 9.0}), train(tmp_path / "b", {0: 8.0})
    outbox = (other / "outbox.jsonl").read_text()
    (other / "outbox.jsonl").write_text(outbox.replace("2048", "2999"))
    text = words(compared(one, other, out=tmp_path / "c.html"))
    assert "The numbers of generated images differ" in text

    (other / "outbox.jsonl").write_text(outbox)
    for folder, weights in ((one, "11" * 32), (other, "22" * 32)):
        record = {"kind": "model", "time": 150_000, "info": {"metric": {"weights_sha256": weights}}}
        with (folder / "outbox.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    text = words(compared(one, other, out=tmp_path / "c.html"))
    assert "The weights of the metric network differ" in text
    assert "111111111111: a; 222222222222: b." in text


def test_steps_of_the_slider_and_the_size_are_bounded(tmp_path: Path) -> None:
    """24 steps of few runs, spread evenly over the grids of all; 10 of twelve."""
    folders = [train(tmp_path / "0", dict.fromkeys(range(100), 1.0)), train(tmp_path / "1", {0: 1.0, 50: 1.0})]
    folders += [train(tmp_path / str(i), dict.fromkeys(range(20), 1.0)) for i in range(2, 12)]
    for count, most in ((2, 24), (12, 10)):
        page = compared(*folders[:count], out=tmp_path / "c.html")
        (found,) = re.findall(r'data-steps="([^"]*)"', page)
        steps = [int(step) for step in found.split()]
        assert (len(steps), steps[0], steps[-1]) == (most, 0, 99)
        assert np.ptp(np.diff(steps)) <= 1
        boxes = page.split('<div class="run">')[1:]
        shown = [[int(kimg) for kimg in re.findall(r'data-kimg="(\d+)"', box)] for box in boxes]
        assert shown[:2] == [steps, [0, 50]]
        assert page.count("data:image/webp") == sum(map(len, shown)) <= 24 * 12


def test_a_run_in_training_and_one_that_has_just_started(tmp_path: Path) -> None:
    one, other = train(tmp_path / "a", {0: 9.0, 4: 8.0}), tmp_path / "b"
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"nimg": 8000, "kimg": 8.0, "loss/gen')
    other.mkdir()
    shutil.copyfile(one / "config.json", other / "config.json")
    text = words(compared(one, other, out=tmp_path / "c.html"))
    assert "No sample grid yet." in text
    assert "No option differs." in text
    assert "b – 0 of 100 – dcgan-cpu-32 unfinished" in text

    (other / "config.json").unlink()
    shutil.copyfile(one / "metrics.jsonl", other / "metrics.jsonl")
    page = compared(one, other, out=tmp_path / "c.html")
    assert "Without config.json, so of unknown options: b." in words(page)
    assert "The data sets differ, so distances between these runs are not comparable." in words(page)


def test_a_damaged_grid_is_a_warning(tmp_path: Path) -> None:
    one, other = train(tmp_path / "a", {0: 9.0, 4: 8.0}), train(tmp_path / "b", {0: 9.0, 4: 8.0})
    (other / "samples" / "fakes_000004kimg.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = compared(one, other, out=tmp_path / "c.html")
    assert "b: fakes_000004kimg.png cannot be read" in words(page)
    assert page.count("data:image/webp") == 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("a", r"/a is given twice"),
        ("./x/../a", r"/a is given twice"),
        ("link", r"/a is given twice"),
        ("missing", r"missing is not a run: it has none of"),
        ("empty", r"empty is not a run: it has none of"),
        ("config", r"config: one of .* is damaged"),
        ("list", r"list: one of .* is damaged \(config.json is no JSON object\)"),
        ("row", r"row: one of .* is damaged \(metrics.jsonl has a line without nimg and kimg\)"),
        ("text", r"text: one of .* is damaged \(metrics.jsonl has a line in which fd2k is no number\)"),
        ("nan", r"nan: one of .* is damaged \(metrics.jsonl has a line in which fd2k is no number\)"),
        ("kind", r"kind: one of .* is damaged \(outbox.jsonl has a line without kind\)"),
        ("time", r"time: one of .* is damaged \(outbox.jsonl has a line without time\)"),
        ("note", r"note: one of .* is damaged \(outbox.jsonl has a line of the kind note without text\)"),
    ],
)
def test_what_is_refused_leaves_nothing(second: str, message: str, tmp_path: Path) -> None:
    train(tmp_path / "a", {0: 9.0})
    (tmp_path / "x").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name, file, content in (
        ("config", "config.json", '{"kimg": '),
        ("list", "config.json", "[]"),
        ("row", "metrics.jsonl", '{"nimg": "many", "kimg": 1}\n'),
        ("text", "metrics.jsonl", '{"nimg": 1000, "kimg": 1, "fd2k": "x"}\n'),
        ("nan", "metrics.jsonl", '{"nimg": 1000, "kimg": 1, "fd2k": NaN}\n'),
        ("kind", "outbox.jsonl", '{"time": 1}\n'),
        ("time", "outbox.jsonl", '{"time": 1e300, "kind": "open"}\n'),
        ("note", "outbox.jsonl", '{"time": 1, "kind": "note", "nimg": 0, "note": "metric"}\n'),
    ):
        train(tmp_path / name, {0: 9.0})
        (tmp_path / name / file).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        main(["report", str(tmp_path / "a"), f"{tmp_path}/{second}", "-o", str(tmp_path / "c.html")])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_at_most_twelve_runs() -> None:
    with pytest.raises(UserError, match="13 runs: a comparison takes at most 12"):
        main(["report", *(f"s3://bucket/{i}" for i in range(13))])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = train(tmp_path / "x" / "mine", {0: 9.0}), train(tmp_path / "y" / "mine", {0: 9.0})
    assert "x/mine · y/mine" in words(compared(one, other, out=tmp_path / "c.html"))


def test_hours_do_not_count_interruptions(tmp_path: Path) -> None:
    folder = train(tmp_path / "a", {0: 9.0, 4: 8.0, 8: 7.0})
    hour = 3_600_000
    records = [
        {"kind": "open", "time": 0},
        {"kind": "scalars", "time": hour, "nimg": 0, "values": {}},
        {"kind": "scalars", "time": 2 * hour, "nimg": 4000, "values": {}},
        {"kind": "open", "time": 50 * hour},
        {"kind": "scalars", "time": 51 * hour, "nimg": 4000, "values": {}},
        {"kind": "status", "time": 52 * hour, "status": "FINISHED"},
    ]
    (folder / "outbox.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    history = read(folder)
    assert history.hours == {0: 1.0, 4000: 3.0}
    assert history.series_over_hours(METRIC).points == [(1.0, 9.0), (3.0, 8.0)]
    assert history.seconds == 4 * 3600


def test_untrusted_text_neither_runs_nor_leaks(tmp_path: Path) -> None:
    evil = tmp_path / EVIL.replace("/", ":")
    one = train(tmp_path / "caf\udce9", {0: 9.0}, recipe=EVIL)
    other = train(evil, {0: 8.0}, note="s3://key:secret@bucket/x?token=secret")
    page = compared(one, other, out=tmp_path / "c.html")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "secret" not in page
    assert r"caf\xe9" in page


def colours() -> list[list[str]]:
    """The six colours of curves, for the light and for the dark scheme."""
    css = (resources.files("trainer.report") / "web" / "compare.css").read_text()
    return [re.findall(r"--c\d: (#\w{6})", block) for block in re.findall(r":root \{([^}]*)\}", css)]


# Of linear RGB, for people without long, middle or short cones (Machado et al. 2009, table 1, severity 1).
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz @ np.clip(rgb, 0, 1)) / (0.9505, 1.0, 1.089)
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_distinguishable(vision: str) -> None:
    """Differences of CIELAB from 30 on, where 2 can just be seen; contrast with the card from 3 on (WCAG 1.4.11)."""
    for palette, card in zip(colours(), ("#ffffff", "#221e1b"), strict=True):
        assert len(palette) == 6
        seen = [lab(np.asarray(VISION[vision]) @ linear(colour)) for colour in palette]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 30
        for colour in palette:
            low, high = sorted(linear(one) @ (0.2126, 0.7152, 0.0722) for one in (colour, card))
            assert (high + 0.05) / (low + 0.05) > 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.fixture
def browser_page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """Three runs, one with an evil name. Afterwards: no errors, and no requests."""
    folders = [
        train(tmp_path / EVIL.replace("/", ":"), {0: 400.0, 4: 90.0, 8: 40.0}),
        train(tmp_path / "b", {0: 400.0, 6: 50.0}, batch=7),
        train(tmp_path / "c", {5: 20.0}, metric="fd2k_opennsfw", digest="cd" * 32),
    ]
    compared(*folders, out=tmp_path / "c.html")
    report = tmp_path / "c.html"
    errors: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("data:", report.as_uri()))] == []


def shown(page: Page) -> list[str]:
    """What is below each run's name."""
    return [run.locator(":scope figcaption, :scope .none").locator("visible=true").inner_text() for run in runs(page)]


def runs(page: Page) -> list[Any]:
    return page.locator(".run").all()


@needs_chromium
def test_on_a_phone_in_a_real_browser(browser_page: Page) -> None:
    page = browser_page
    assert page.title() == "Comparison of 3 runs – report"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320

    assert shown(page) == [f"8 kimg: {METRIC} 40.00", f"6 kimg: {METRIC} 50.00", "5 kimg: fd2k_opennsfw 20.00"]
    page.focus("#at")
    page.keyboard.press("ArrowLeft")
    assert shown(page)[0] == f"4 kimg: {METRIC} 90.00"
    assert shown(page)[1] == f"6 kimg: {METRIC} 50.00"
    assert page.get_attribute("#at", "aria-valuetext") == "6 kimg"
    page.keyboard.press("Home")
    assert shown(page) == [f"0 kimg: {METRIC} 400.00", f"0 kimg: {METRIC} 400.00", "No grid at or below 0 kimg."]

    # The values at the slider's position, of the runs that reached it.
    metric = page.locator(".charts > div").first
    outputs = metric.locator(".keys output")
    assert outputs.all_inner_texts() == ["400", "400"]
    page.keyboard.press("End")
    assert outputs.all_inner_texts() == ["40", ""]

    assert metric.locator("svg:visible").get_attribute("data-unit") == "kimg"
    page.get_by_label("kimg, thousands").focus()
    page.keyboard.press("ArrowRight")
    assert metric.locator("svg:visible").get_attribute("data-unit") == "hours"
    assert outputs.all_inner_texts() == ["", ""]
    box = metric.locator("svg:visible").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    assert outputs.all_inner_texts() == ["40", ""]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_violation(browser_page: Page, scheme: Any) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    found = Axe().run(browser_page)
    assert found.violations_count == 0, found.generate_report()
