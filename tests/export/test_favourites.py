"""Favourites on the web page: marks, the command, and the page's address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.export.test_page import needs_chromium, needs_npm, onnx_file, open_page, site  # noqa: F401  # fixtures

pytestmark = pytest.mark.slow


@needs_npm
@needs_chromium
def test_marks_command_and_address(open_page: Callable[..., Page]) -> None:  # noqa: F811
    page = open_page("#seed=5&left=5&right=6&mix=0")
    section, command, stars = page.locator("section.wide"), page.locator("#command"), page.locator(".stars button")
    assert not section.is_visible()
    stars.nth(2).click()  # seeds 7, 8, 10
    stars.nth(3).focus()
    page.keyboard.press("Enter")
    stars.nth(5).focus()
    page.keyboard.press("Space")
    assert stars.nth(5).get_attribute("aria-label") == "Favourite cat 10"
    assert command.input_value() == "catinfer --onnx gen.onnx --seeds 7-8,10"
    assert page.url.endswith("&favourites=7-8,10")

    # Changes by the rest of the page keep them.
    page.focus("#mix")
    page.keyboard.press("ArrowRight")
    page.focus("#psi")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**mix=1&psi=0.95&favourites=7-8,10")
    assert command.input_value() == "catinfer --onnx gen.onnx --seeds 7-8,10 --psi 0.95"
    page.fill("#seed", "8")
    page.keyboard.press("Enter")
    page.wait_for_url("**#seed=8&**favourites=7-8,10")
    pressed = [star.get_attribute("aria-pressed") for star in stars.all()]
    assert pressed == ["true", "false", "true", *["false"] * 13]  # 8, 9, 10...

    page.evaluate("location.hash = 'seed=0&psi=1&favourites=3,x,7-9'")
    page.locator("#favourites-status", has_text="4 marked.").wait_for()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-command")
    page.locator("#favourites-status", has_text="Command copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "catinfer --onnx gen.onnx --seeds 3,7-9"
    page.click("#clear")
    assert not section.is_visible()
    assert "favourites" not in page.url


@needs_npm
@needs_chromium
def test_axe_finds_no_violations_with_favourites(open_page: Callable[..., Page]) -> None:  # noqa: F811
    phone = {"viewport": {"width": 320, "height": 640}}
    page = open_page("#seed=0&left=0&right=1&favourites=2-4", bypass_csp=True, **phone)
    assert page.locator("section.wide").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
