"""The menu of classes on the page, in a real Chromium, against catinfer."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page

from export.page import write_page
from infer.cli import main as catinfer
from infer.directions import ENTRY, encode
from infer.latents import latents, slerp
from infer.origin import inspect
from infer.provenance import Provenance
from infer.session import Generator
from tests.export.test_page import (
    MODULES,
    assert_same_image,
    needs_chromium,
    needs_node,
    needs_npm,
    open_page,  # noqa: F401  # a fixture
    pixels,
    site,  # noqa: F401  # a fixture
)
from tests.infer.conditional import conditional
from tests.infer.conftest import Z_DIM, build

pytestmark = pytest.mark.slow

NAMES = ["black", 'it\'s "tabby" & <b>white</b>, both', "white"]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with the inputs label and psi, and directions."""
    vectors = np.linalg.qr(np.random.default_rng(2).standard_normal((Z_DIM, 2)))[0].T
    path = tmp_path_factory.mktemp("model") / "gen.onnx"
    model = conditional(NAMES, psi=True, metadata={ENTRY: encode(vectors)})
    path.write_bytes(model.SerializeToString())
    return path


@needs_npm
@needs_chromium
def test_the_menu_chooses_the_class_of_all_images(
    open_page: Callable[..., Page],  # noqa: F811
    onnx_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = open_page("#seed=5&left=3&right=7&mix=25&psi=0.7&class=white&d2=1.5")
    assert page.url.endswith("#seed=5&left=3&right=7&mix=25&psi=0.7&class=white&d2=1.5")
    assert page.eval_on_selector_all("#class option", "options => options.map(option => option.text)") == NAMES
    generator, psi = Generator(onnx_file, "cpu"), 0.7
    z, (a, b) = latents(range(5, 21), Z_DIM), latents([3, 7], Z_DIM)
    for i, expected in enumerate(generator(z, psi, label=2)):
        assert_same_image(pixels(page, f"#grid button:nth-child({i + 1}) canvas"), expected)
    page.wait_for_selector('#blend[aria-label^="A cat of the class white, 75% cat 3"]')

    page.click("#directions summary")
    page.click("#reset")
    page.get_by_role("combobox", name="Class", exact=True).select_option(NAMES[1])
    page.wait_for_url("**&class=it*")
    page.wait_for_selector('#blend[aria-label^="A cat of the class it"]:not([aria-label*="moved"])')
    page.locator("#status", has_text="each").wait_for()
    for i, expected in enumerate(generator(z, psi, label=1)):
        assert_same_image(pixels(page, f"#grid button:nth-child({i + 1}) canvas"), expected)
    assert_same_image(pixels(page, "#blend"), generator(slerp(a, b, 0.25)[None], psi, label=1)[0])

    with page.expect_download() as waiting:
        page.click("#save")
    (record,) = inspect([str(waiting.value.path())])["files"]
    assert (record["classes"], record["seeds"], record["psi"]) == ([NAMES[1]], "3,7", [0.7])
    address = capsys.readouterr().err.split("shows it again with ")[1].strip()
    with Image.open(waiting.value.path()) as image:
        saved = np.asarray(image.convert("RGB"))
    page.goto(page.url.partition("#")[0] + address)
    page.wait_for_selector('#blend[aria-label^="A cat of the class it"]')
    np.testing.assert_array_equal(pixels(page, "#blend"), saved)

    page.locator(".stars button").nth(1).click()
    page.locator(".stars button").nth(4).click()
    words = shlex.split(page.locator("#command").input_value())
    monkeypatch.chdir(onnx_file.parent)
    catinfer([*words[1:], "--device", "cpu", "--out", str(tmp_path / "favourites.npy")])
    for at, expected in zip((2, 5), np.load(tmp_path / "favourites.npy"), strict=True):
        assert_same_image(pixels(page, f"#grid button:nth-child({at}) canvas"), expected)
    page.get_by_role("combobox", name="Class", exact=True).select_option("black")
    page.wait_for_url("**&class=black&favourites=*")
    assert page.locator("#command").input_value().endswith(" --psi 0.7 --class=black")


@needs_npm
@needs_chromium
def test_an_unknown_class_is_the_first_one(open_page: Callable[..., Page]) -> None:  # noqa: F811
    page = open_page("#seed=0&left=0&right=1&class=red")
    page.wait_for_url("**&psi=1&class=black")
    page.focus("#class")
    page.keyboard.press("End")
    page.wait_for_url("**&class=white")


@needs_npm
@needs_chromium
def test_axe_finds_no_violations_with_a_menu(open_page: Callable[..., Page]) -> None:  # noqa: F811
    page = open_page("#seed=0&left=0&right=1", bypass_csp=True, viewport={"width": 320, "height": 640})
    assert page.get_by_role("combobox", name="Class", exact=True).is_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@needs_node
@pytest.mark.parametrize("name", NAMES)
def test_packets_equal_catinfers(tmp_path: Path, name: str) -> None:
    module = shutil.copy(MODULES / "provenance.js", tmp_path / "provenance.mjs")
    given = {"software": "a <b>", "sha256": "0" * 64, "left": 3, "right": 7, "mix": 25, "psi": 0.7, "moves": {}}
    script = f"""
        import {{ packetOf }} from {json.dumps(module.as_uri())};
        process.stdout.write(packetOf({json.dumps(given | {"class": name})}));
    """
    run = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, check=True)
    origin = Provenance("blend", "0" * 64, (3, 7), (0.7,), mix=25, classes=[name], software="a <b>")
    assert run.stdout == origin.packet()


def test_a_page_of_a_generator_without_classes_has_no_menu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.page._onnxruntime_web", dict)
    for name, model in (("plain", build()), ("classes", conditional())):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
        write_page(tmp_path / f"{name}.onnx", tmp_path / name)
    assert "classes" not in json.loads((tmp_path / "plain" / "gen.json").read_text())
    assert json.loads((tmp_path / "classes" / "gen.json").read_text())["classes"] == ["black", "tabby", "white"]
