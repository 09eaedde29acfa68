"""The page of a sweep in a real Chromium, and that untrusted text neither runs nor leaks."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.trainer.sweeps.sweeps import add, make, open_ledger
from trainer.sweeps import page as sweep_page
from trainer.sweeps.state import Ledger
from trainer.sweeps.verdict import decide

pytestmark = pytest.mark.slow

EVIL = "<script>document.title='taken'</script>"

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the system package chromium")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Ledger, str]:
    """A sweep with trials of every status, and its page."""
    plan = make("--try", "optim.g-lr=log:1e-4..1e-2", "--try", "batch=8,16,32", "--trials", "5")
    ledger = open_ledger(tmp_path / EVIL.replace("/", ":"), plan)
    for i, (status, last) in enumerate([("done", 40.0), ("done", 25.0), ("stopped", 70.0), ("failed", 0.0)]):
        distances = {1.0: 100.0 - i, 3.0: 90.0 - 5 * i, 9.0: last} if status == "done" else {1.0: last}
        values = {"optim.g-lr": f"{i + 1}e-3", "batch": ("8", "16", "32")[i % 3]}
        add(ledger, f"t{i:02d}", values, distances if status != "failed" else {}, status)  # type: ignore[arg-type]
        samples = ledger.storage.work / f"t{i:02d}" / "samples"
        samples.mkdir(parents=True)
        Image.new("RGB", (64, 64), (40 * i, 90, 30)).save(samples / "fakes_000009kimg.png")
    for name, value in (("t00-s1", 41.0), ("t00-s2", 42.0), ("t01-s1", 26.0), ("t01-s2", 26.5)):
        add(ledger, name, ledger.trials[name[:3]].values, {9.0: value}, "done")
    ledger.trials["t03"].message = f"{EVIL} https://me:secret@host/x?signature=secret"
    html = sweep_page.render(plan, ledger, decide(ledger.trials), f"python trainer/run.py '{EVIL}'", "FINISHED")
    return ledger, html


def test_the_page_has_all_trials_and_escapes_everything(made: tuple[Ledger, str]):
    _, html = made
    assert EVIL not in html
    assert "secret" not in html
    for name in ("t00", "t01", "t02"):
        assert len(re.findall(f'<polyline[^>]*data-trial="{name}"', html)) == 2, "in both charts"
    assert 'class="line stopped" data-trial="t02"' in html
    assert 'class="line best" data-trial="t01"' in html
    assert html.count("<figure>") == 3
    assert "better than t00 by more than noise" in html
    assert "26.25 +- " in html
    assert "t03" in html


def test_a_sweep_without_distances_has_a_page(tmp_path: Path):
    plan = make("--try", "batch=8,16", "--trials", "2")
    ledger = open_ledger(tmp_path / "s", plan)
    html = sweep_page.render(plan, ledger, None, None, "KILLED")
    assert "No trial has come to an evaluation" in html
    add(ledger, "t00", {"batch": "8"}, {1.0: 30.0}, "running")
    assert "t00" in sweep_page.render(plan, ledger, decide(ledger.trials), "x", "KILLED"), "one point, one trial"


@pytest.fixture
def browser_page(made: tuple[Ledger, str], tmp_path: Path) -> Iterator[Page]:
    """The page on a phone. Afterwards: no errors, and no requests."""
    file = tmp_path / "sweep.html"
    file.write_text(made[1])
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 320, "height": 640})
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        yield page
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("data:", file.as_uri()))] == []


@needs_chromium
def test_trials_are_marked_with_the_keyboard(browser_page: Page):
    page = browser_page
    assert page.title() == f"{EVIL.replace('/', ':')} – report"
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 64)")
    button = page.locator("button[value=t02]")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("polyline.marked").count() == 2
    assert set(page.locator(".marked").evaluate_all("lines => lines.map((line) => line.dataset.trial)")) == {"t02"}
    page.keyboard.press("Enter")
    assert page.locator(".marked").count() == 0
    faded = page.locator("polyline.stopped").first.evaluate("line => getComputedStyle(line).opacity")
    assert float(faded) < 0.5


@needs_chromium
def test_axe_finds_no_accessibility_violation(browser_page: Page):
    found = Axe().run(browser_page)
    assert found.violations_count == 0, found.generate_report()
