"""Favourites in the report of a run: marking images in a real Chromium, by mouse and by keyboard."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from infer.grid import grid
from infer.values import parse_seeds
from trainer.report.page import write_report

pytestmark = pytest.mark.slow

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the system package chromium")


def train(folder: Path, count: int = 14, size: int = 32) -> Path:
    """The folder of a run with two grids of ``count`` images: four columns, the last row incomplete."""
    (folder / "samples").mkdir(parents=True)
    (folder / "best").mkdir()
    (folder / "best" / "gen.onnx").write_bytes(b"not read")
    (folder / "config.json").write_text(json.dumps({"model": {"size": size}, "track": {"grid": count}}))
    rows = [{"nimg": n * 1000, "kimg": float(n), "fd2k_efflite0": value} for n, value in ((0, 9.0), (4, 10.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kimg in (0, 4):
        images = np.random.default_rng(kimg).integers(0, 256, (14, 32, 32, 3), np.uint8)
        grid(images).save(folder / "samples" / f"fakes_{kimg:06d}kimg.png")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return train(tmp_path / "it's mine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser, run_dir: Path) -> Iterator[Page]:
    """The report on a phone. Afterwards: no errors."""
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 320, "height": 640})
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(write_report(run_dir).as_uri())
    yield page
    page.close()
    assert errors == []


@needs_chromium
def test_marking_by_mouse(page: Page, run_dir: Path) -> None:
    """A click at the centre of image i marks seed i, and the command generates the marked ones."""
    image = page.locator(".frames img:visible")
    for seed in (3, 13, 12, 11, 5, 5):
        row, column = divmod(seed, 4)
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] * (column + 0.5) / 4, box["y"] + box["height"] * (row + 0.5) / 4)
    assert page.locator("#seeds").inner_text() == "3,11-13"
    assert page.url.endswith("#seeds=3,11-13")
    command = shlex.split(page.input_value("#command"))
    assert command == ["catinfer", "--onnx", str(run_dir / "best" / "gen.onnx"), "--seeds", "3,11-13"]
    assert list(parse_seeds(command[-1])) == [3, 11, 12, 13]
    assert page.locator(".cells button").count() == 14


@needs_chromium
def test_marking_by_keyboard(page: Page) -> None:
    page.get_by_role("button", name="Seed 0").focus()
    for key in ("ArrowRight", "Space", "ArrowDown", "Enter", "ArrowLeft", "ArrowUp", "ArrowUp", "Space"):
        page.keyboard.press(key)
    assert page.locator("#seeds").inner_text() == "0-1,5"
    page.keyboard.press("Space")
    assert page.locator("#seeds").inner_text() == "1,5"
    page.keyboard.press("Tab")  # one stop for all images
    assert page.evaluate("document.activeElement.id") == "play"


@needs_chromium
def test_the_address_keeps_the_favourites(page: Page) -> None:
    address = page.url
    for fragment, seeds in (("3,7-9", "3,7-9"), ("9999,2,x", "none marked"), ("5-99999999", "5-13"), ("0,,-1", "0")):
        page.goto("about:blank")
        page.goto(f"{address}#seeds={fragment}")
        assert page.locator("#seeds").inner_text() == seeds, fragment
    page.evaluate("location.hash = '#seeds=4'")
    page.wait_for_function("document.querySelector('#seeds').value === '4'")
    page.click("#clear")
    assert page.url == address
    assert page.input_value("#command") == ""
    assert page.locator("#copy").is_disabled()


@needs_chromium
def test_the_command_is_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Seed 7").click()
    page.click("#copy")
    page.locator("#copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.input_value("#command")


@needs_chromium
def test_axe_finds_no_accessibility_violation(page: Page) -> None:
    page.get_by_role("button", name="Seed 7").click()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_what_the_command_cannot_show_is_said(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert "best generator, of 0 kimg; its images differ from those of this grid." in page
    assert "does not exist yet" not in page
    (run_dir / "best" / "gen.onnx").unlink()
    assert "does not exist yet" in write_report(run_dir).read_text()


@pytest.mark.parametrize(("count", "size"), [(64, 32), (14, 64), (0, 32), ("many", 32)])
def test_grids_of_unknown_seeds_have_no_favourites(count: int, size: int, tmp_path: Path) -> None:
    """The file was made with another number of images or another size, or the setting is damaged."""
    assert 'class="favourites"' not in write_report(train(tmp_path / "a", count, size)).read_text()


def test_a_grid_that_cannot_be_read_is_not_the_latest(run_dir: Path) -> None:
    (run_dir / "samples" / "fakes_000004kimg.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = write_report(run_dir).read_text()
    assert 'class="favourites"' in page
    assert "its images differ" not in page  # the grid is of 0 kimg, as the best generator
