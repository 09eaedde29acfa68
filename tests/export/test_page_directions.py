"""The sliders of directions on the page, in a real Chromium, against catinfer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from export.page import write_page
from infer.cli import main as catinfer
from infer.directions import ENTRY, encode
from tests.export.test_page import (
    assert_same_image,
    needs_chromium,
    needs_npm,
    open_page,  # noqa: F401  # a fixture
    pixels,
    site,  # noqa: F401  # a fixture
)
from tests.infer.conftest import Z_DIM, build

pytestmark = [pytest.mark.slow, needs_npm, needs_chromium]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with three directions."""
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((Z_DIM, 3)))[0].T
    path = tmp_path_factory.mktemp("model") / "gen.onnx"
    path.write_bytes(build(metadata={ENTRY: encode(vectors)}).SerializeToString())
    return path


def test_sliders_move_the_cat_as_catinfer(open_page: Callable[..., Page], onnx_file: Path, tmp_path: Path) -> None:  # noqa: F811
    page = open_page("#seed=0&left=3&right=7&mix=0&psi=0.7&d1=2.5&d3=-1&d2=9&d4=1")
    page.wait_for_selector('#blend[aria-label$="moved along directions"]')
    assert page.url.endswith("#seed=0&left=3&right=7&mix=0&psi=0.7&d1=2.5&d3=-1")
    chosen = ["--onnx", str(onnx_file), "--seeds", "3", "--psi", "0.7", "--device", "cpu"]
    catinfer([*chosen, "--direction", "1=2.5", "--direction", "3=-1", "--out", str(tmp_path / "moved.npy")])
    assert_same_image(pixels(page, "#blend"), np.load(tmp_path / "moved.npy")[0])

    page.click("#directions summary")
    values = page.eval_on_selector_all("#sliders input", "inputs => inputs.map(input => input.value)")
    assert values == ["2.5", "0", "-1"]
    before = pixels(page, "#blend")
    page.focus("#sliders input[name=d2]")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**&d1=2.5&d2=0.1&d3=-1")
    assert page.inner_text("#sliders label:nth-child(2) output") == "0.1"
    page.click("#reset")
    page.wait_for_url("**&psi=0.7")
    page.wait_for_selector('#blend:not([aria-label*="moved"])')
    catinfer([*chosen, "--out", str(tmp_path / "still.npy")])
    assert_same_image(pixels(page, "#blend"), np.load(tmp_path / "still.npy")[0])
    assert (pixels(page, "#blend") != before).any()


def test_axe_finds_no_violations_in_the_sliders(open_page: Callable[..., Page]) -> None:  # noqa: F811
    page = open_page("#seed=0&left=0&right=1", bypass_csp=True, viewport={"width": 320, "height": 640})
    page.click("#directions summary")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_page_of_a_file_without_directions_has_no_sliders(tmp_path: Path) -> None:
    (tmp_path / "gen.onnx").write_bytes(build().SerializeToString())
    write_page(tmp_path / "gen.onnx", tmp_path / "page")
    assert "directions" not in json.loads((tmp_path / "page" / "gen.json").read_text())
