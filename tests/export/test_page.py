"""The page in a real Chromium, and its random numbers against NumPy's."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, sync_playwright

import export.page
from catgan.command import UserError
from export.cli import main
from export.generator import export_onnx
from export.page import write_page
from infer.containers import find_xmp
from infer.files import encode
from infer.latents import latents, slerp
from infer.origin import inspect, read_packet
from infer.provenance import Provenance, this_software
from infer.session import Generator
from tests.infer.conftest import build
from trainer.config import ModelConfig
from trainer.models import build_generator

pytestmark = pytest.mark.slow

MODULES = Path(export.page.__file__).parent / "web"
TAIL = 3.6541528853610088  # start of the ziggurat's tail
PNG = encode(np.zeros((8, 8, 3), np.uint8), ".png")
MIXED = '#blend[aria-label*="{}"]'  # wait_for_function would need eval, which the page's policy forbids

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs the system package nodejs")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs the system package npm")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the system package chromium")


@pytest.fixture(scope="module")
def onnx_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the parameter "stylegan2", a generator with the input psi."""
    path = tmp_path_factory.mktemp("model") / "gen.onnx"
    if getattr(request, "param", None) == "stylegan2":
        torch.manual_seed(0)
        generator = build_generator(ModelConfig(arch="stylegan2", size=16, z_dim=16, g_width=4, max_width=8))
        generator.measure([torch.randn(64, 16)])
        export_onnx(generator, path, {"recipe": "stylegan2"})
    else:
        path.write_bytes(build().SerializeToString())
    return path


@pytest.fixture(scope="module")
def site(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the served page."""
    folder = tmp_path_factory.mktemp("site") / "page"
    assert main([str(onnx_file), "--web", str(folder)]) == {"web": str(folder)}

    command = [sys.executable, "-c", "from infer.cli import entry; entry()", "serve", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    yield server.stderr.readline().split()[0]
    server.terminate()
    server.wait()


@pytest.fixture
def open_page(site: str) -> Iterator[Callable[..., Page]]:
    """Opens the page with a URL fragment; afterwards asserts an empty console and no requests to other hosts."""
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def open_page(fragment: str, **context: Any) -> Page:
            page = browser.new_page(**context)
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(site + fragment)
            page.locator("#status", has_text="each").wait_for(timeout=60_000)
            return page

        yield open_page
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((site, "data:", "blob:"))] == []


def pixels(page: Page, selector: str) -> np.ndarray:
    url = page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def assert_same_image(ours: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 5  # an image of one colour would prove nothing
    assert np.mean(np.abs(ours.astype(int) - expected) <= 1) >= 0.999


@needs_node
def test_latents_equal_numpys(tmp_path: Path) -> None:
    seeds = [*range(3000), 2**32 - 1, 2**32, 10**15 - 1, 2**64, 2**128 + 1, 2**200 + 5]
    module = shutil.copy(MODULES / "random.js", tmp_path / "random.mjs")  # Node takes .js for CommonJS
    script = f"""
        import {{ latent }} from {json.dumps(module.as_uri())};
        for (const seed of {json.dumps([str(seed) for seed in seeds])})
          process.stdout.write(Buffer.from(latent(BigInt(seed), 128).buffer));
    """
    run = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, check=True)
    ours, theirs = np.frombuffer(run.stdout, np.float32).reshape(-1, 128), latents(seeds, 128)
    tail = np.abs(theirs) > TAIL
    assert tail.any()
    np.testing.assert_array_equal(ours[~tail].view(np.int32), theirs[~tail].view(np.int32))
    # In the tail NumPy calls the C library's log1pf, whose last bit is not the same everywhere.
    np.testing.assert_array_max_ulp(ours[tail], theirs[tail], maxulp=1)


@needs_node
@pytest.mark.parametrize(
    ("left", "right", "mix", "psi", "moves"),
    [(3, 7, 25, 0.7, {}), (3, 4, 0, 1.0, {1: 2.5, 2: -1.0}), (4, 4, 100, 0.0, {}), (9, 2, 5, 0.05, {12: -0.1})],
)
def test_packets_equal_catinfers(
    tmp_path: Path, left: int, right: int, mix: int, psi: float, moves: dict[int, float]
) -> None:
    module = shutil.copy(MODULES / "provenance.js", tmp_path / "provenance.mjs")
    given = {"software": this_software(), "sha256": "0" * 64, "left": left, "right": right, "mix": mix, "psi": psi}
    given["moves"] = {f"d{number}": f"{amount:g}" for number, amount in moves.items()}
    script = f"""
        import {{ packetOf, withPacket }} from {json.dumps(module.as_uri())};
        const png = new Blob([Buffer.from({json.dumps(base64.b64encode(PNG).decode())}, "base64")]);
        const marked = await withPacket(png, packetOf({json.dumps(given)}));
        process.stdout.write(Buffer.from(await marked.arrayBuffer()));
    """
    run = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, check=True)
    packet = Provenance("blend", "0" * 64, (left, right), (psi,), mix=mix, directions=moves).packet()
    assert find_xmp(io.BytesIO(run.stdout), "png") == packet  # checks the chunk's checksum too
    assert run.stdout == encode(np.zeros((8, 8, 3), np.uint8), ".png", packet)


@needs_npm
@needs_chromium
@pytest.mark.parametrize("onnx_file", ["dcgan", "stylegan2"], indirect=True)
def test_images_equal_catinfers(open_page: Callable[..., Page], onnx_file: Path) -> None:
    page = open_page("#seed=5&left=3&right=7&mix=25&psi=0.7")
    generator, psi = Generator(onnx_file, "cpu"), 0.7
    z = latents(range(5, 21), generator.z_dim)
    for i, expected in enumerate(generator(z, psi)):
        assert_same_image(pixels(page, f"#grid button:nth-child({i + 1}) canvas"), expected)
    a, b = latents([3, 7], generator.z_dim)
    page.wait_for_selector(MIXED.format("25% cat 7"))
    assert_same_image(pixels(page, "#blend"), generator(slerp(a, b, 0.25)[None], psi)[0])
    assert re.fullmatch(r"Generated in [\d.]+ ms\.", page.inner_text("#blend-time"))


@needs_npm
@needs_chromium
def test_keyboard_link_and_download(
    open_page: Callable[..., Page], onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = open_page("#seed=0&left=0&right=1&mix=0")
    page.focus("#grid button:nth-child(10)")
    page.keyboard.press("Enter")  # cat 9 becomes the right one
    page.focus("#mix")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(MIXED.format("99% cat 9"))
    assert page.url.endswith("#seed=0&left=1&right=9&mix=99&psi=1")
    assert page.get_attribute("#grid button:nth-child(10)", "aria-pressed") == "true"

    with page.expect_download() as waiting:
        page.focus("#save")
        page.keyboard.press("Space")
    assert waiting.value.suggested_filename == "cat-1-9-99.png"
    with Image.open(waiting.value.path()) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels(page, "#blend"))
    (record,) = inspect([str(waiting.value.path())])["files"]
    origin = Provenance("blend", Generator(onnx_file, "cpu").sha256, (1, 9), (1.0,), mix=99)
    assert record | read_packet(origin.packet()) == record
    assert capsys.readouterr().err.endswith("shows it again with #left=1&right=9&mix=99&psi=1\n")

    before = pixels(page, "#grid canvas")
    page.focus("#seed")
    page.keyboard.press("Control+A")
    page.keyboard.type("123")
    page.keyboard.press("Enter")
    page.wait_for_url("**#seed=123&**")
    page.locator("#status", has_text="each").wait_for()
    assert (pixels(page, "#grid canvas") != before).any()
    generator = Generator(onnx_file, "cpu")
    assert_same_image(pixels(page, "#grid canvas"), generator(latents([123], generator.z_dim))[0])

    page.focus("#new")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"#seed=(?!123&)"))


@needs_npm
@needs_chromium
def test_a_small_screen_and_invalid_values_in_the_address(open_page: Callable[..., Page]) -> None:
    phone = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
    page = open_page("#seed=-1&left=x&mix=1e9&psi=NaN", **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.tap("#grid button:nth-child(2)")
    page.wait_for_selector(MIXED.format("100% cat"))
    assert re.search(r"#seed=\d+&left=\d+&right=\d+&mix=100&psi=1$", page.url)


@needs_npm
@needs_chromium
def test_seeds_that_catinfer_does_not_take_are_refused(open_page: Callable[..., Page]) -> None:
    page = open_page("#seed=4294967295&left=4294967295&right=4294967296")
    assert page.url.endswith("#seed=4294967280&left=4294967295&right=4294967281&mix=50&psi=1")
    page.fill("#seed", "4294967281")
    page.press("#seed", "Enter")
    assert page.eval_on_selector("#seed", "field => field.validationMessage") == "Give at most 4294967280."
    page.fill("#seed", "7")
    page.press("#seed", "Enter")
    page.wait_for_url("**#seed=7&**")


@needs_npm
@needs_chromium
@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
def test_axe_finds_no_violations(open_page: Callable[..., Page], colour_scheme: str) -> None:
    # Without bypass_csp the policy would block the checker, which is not part of the page.
    page = open_page("#seed=0&left=0&right=1", bypass_csp=True, color_scheme=colour_scheme)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@needs_npm
@needs_chromium
def test_the_policy_forbids_other_hosts(site: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(site)
        blocked = page.evaluate(
            """() => new Promise((resolve) => {
              document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
              fetch("http://127.0.0.2:9/").catch(() => {});
            })"""
        )
        browser.close()
    assert blocked == "connect-src"


def test_folders_with_other_files_are_not_replaced(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has other files, such as thesis\.txt"):
        write_page(onnx_file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@needs_npm
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_page_stays_when_the_new_one_cannot_take_its_place(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = tmp_path / "page"
    write_page(onnx_file, folder)
    (folder / "gen.json").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write_page(onnx_file, folder)
    assert (folder / "gen.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


@needs_npm
def test_a_link_to_a_page_leads_to_the_new_one(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "page").symlink_to("served")
    write_page(onnx_file, tmp_path / "page")
    assert (tmp_path / "page").is_symlink()
    assert (tmp_path / "served" / "gen.json").is_file()


def test_the_working_directory_is_not_replaced(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the working directory"):
        write_page(onnx_file, Path())


def test_a_folder_with_only_a_model_is_not_an_earlier_page(onnx_file: Path, tmp_path: Path) -> None:
    (tmp_path / "gen.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"has other files, such as gen\.onnx"):
        write_page(onnx_file, tmp_path)
    assert (tmp_path / "gen.onnx").read_bytes() == b"mine"


def test_a_generator_with_uint8_output_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rounded.onnx"
    export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), path, {"recipe": "tiny"}, uint8=True)
    with pytest.raises(UserError, match="without --uint8"):
        write_page(path, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo ENOTFOUND >&2; exit 1", r"npm pack onnxruntime-web@[\d.]+ failed \(ENOTFOUND\)"),
        ('echo other >"$4/onnxruntime-web.tgz"', "is not the expected one"),
        (None, "needs npm once"),
    ],
)
def test_nothing_is_written_when_npm_fails(
    script: str | None, reason: str, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    path = "/usr/bin:/bin"
    if script is None:
        path = str(tmp_path / "nowhere")
    else:
        fake_npm(tmp_path / "bin", script)
        path = f"{tmp_path / 'bin'}:{path}"
    monkeypatch.setenv("PATH", path)
    with pytest.raises(UserError, match=reason):
        write_page(onnx_file, tmp_path / "page")
    assert not (tmp_path / "page").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_not_used(onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / f"{export.page.ONNXRUNTIME_WEB}.tgz"
    cached.write_bytes(b"broken")
    assert hashlib.sha512(cached.read_bytes()).hexdigest() != export.page.SHA512
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="needs npm once"):
        write_page(onnx_file, tmp_path / "page")
