"""Scores with known values, and checks of damaged drawn cats."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainer.data.build.clean import MIN_CONTRAST, MIN_SHARPNESS, image_flaws, shape_flaw, sharpness
from trainer.data.drawn.synth import draw

Damage = Callable[[Image.Image], Image.Image]


def cats(size: int) -> list[Image.Image]:
    return [Image.fromarray(draw(0, index, size)[0]) for index in range(3)]


def kinds(image: Image.Image) -> list[str]:
    return [flaw.kind for flaw in image_flaws(image)]


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(8, 8), (300, 100), (100, 300), (4000, 3000)])
def test_usual_shapes_pass(width: int, height: int) -> None:
    assert shape_flaw(width, height) is None


@pytest.mark.parametrize(("width", "height"), [(301, 100), (100, 301)])
def test_banners_are_too_narrow(width: int, height: int) -> None:
    flaw = shape_flaw(width, height)
    assert flaw
    assert str(flaw) == f"too narrow: {width}x{height}, at most 3 to 1"
    assert (flaw.score, flaw.limit) == (3.01, 3.0)


@pytest.mark.parametrize("frequency", [0.1, 0.5, 1.0, 2.0])
def test_sharpness_of_a_wave(frequency: float) -> None:
    """2 - 2 cos w, along either axis, except for the waves that are cut off at the edge."""
    wave = np.sin(frequency * np.arange(2000, dtype=np.float32))[None].repeat(4, axis=0)
    expected = 2 - 2 * math.cos(frequency)
    assert sharpness(wave) == pytest.approx(expected, rel=0.01)
    assert sharpness(wave.T) == pytest.approx(expected, rel=0.01)


def test_sharpness_of_a_checkerboard_noise_and_nothing() -> None:
    board = np.indices((16, 16)).sum(0).astype(np.float32) % 2
    assert sharpness(board) == pytest.approx(8)
    assert sharpness(np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)) == pytest.approx(
        5, rel=0.02
    )
    assert sharpness(np.full((8, 8), 7, np.float32)) == 0


def test_sharpness_ignores_brightness_and_contrast() -> None:
    luma = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    assert sharpness(0.1 * luma + 5) == pytest.approx(sharpness(luma), rel=1e-4)


@pytest.mark.parametrize("size", [16, 64, 200])
def test_drawn_cats_and_noise_pass(size: int) -> None:
    assert all(image_flaws(image) == [] for image in [*cats(size), noise(size), noise(8)])


@pytest.mark.parametrize("size", [16, 64, 128, 200])
@pytest.mark.parametrize(
    "damage",
    [
        lambda image: image.filter(ImageFilter.GaussianBlur(2 * max(1, image.width / 128))),
        lambda image: image.resize((max(4, image.width // 8),) * 2).resize(image.size, Image.Resampling.BICUBIC),
    ],
    ids=["blur", "enlargement"],
)
def test_blur_is_caught(size: int, damage: Damage) -> None:
    for cat in cats(size):
        flaw = image_flaws(damage(cat))[-1]
        assert (flaw.kind, flaw.limit) == ("blurred", MIN_SHARPNESS)
        assert flaw.score < MIN_SHARPNESS
        assert str(flaw) == f"blurred: sharpness {flaw.score:.2f}, 0.5 is needed"


def test_blur_that_is_invisible_at_128_pixels_is_accepted() -> None:
    """2 of 384 pixels are two thirds of a pixel at 128, where sharpness is measured."""
    assert kinds(Image.fromarray(draw(0, 0, 384)[0]).filter(ImageFilter.GaussianBlur(2))) == []
    assert kinds(cats(64)[0].filter(ImageFilter.GaussianBlur(2))) == ["blurred"]


def test_image_that_was_enlarged_twice_is_accepted() -> None:
    for cat in cats(64):
        assert kinds(cat.resize((32, 32), Image.Resampling.LANCZOS).resize((64, 64), Image.Resampling.LANCZOS)) == []


@pytest.mark.parametrize("size", [8, 64, 200])
def test_underexposed_images_are_dark(size: int) -> None:
    for cat in cats(64):
        dark = cat.resize((size, size), Image.Resampling.LANCZOS).point(lambda value: round(0.05 * value))
        assert kinds(dark)[0] == "too dark"
        assert str(image_flaws(dark)[0]).startswith("too dark: 99% of it is below ")


def test_black_cat_with_eyes_is_not_dark() -> None:
    image = Image.new("RGB", (64, 64))
    for x in (16, 40):
        image.paste("yellow", (x, 24, x + 8, 32))
    assert np.asarray(image).mean() < 6
    assert kinds(image) == []


@pytest.mark.parametrize("color", ["white", "red", "grey", (31, 31, 31)])
def test_one_colour_is_flat(color: str | tuple[int, int, int]) -> None:
    flaw, blurred = image_flaws(Image.new("RGB", (64, 64), color))
    assert (flaw.kind, flaw.limit) == ("flat", MIN_CONTRAST)
    assert flaw.score == pytest.approx(0, abs=1e-3)
    assert str(flaw) == "flat: brightness deviates by 0.0 of 255, 8 is needed"
    assert blurred.kind == "blurred"


@pytest.mark.parametrize(("deviation", "expected"), [(MIN_CONTRAST - 1, ["flat"]), (MIN_CONTRAST + 1, [])])
def test_contrast_is_the_standard_deviation(deviation: float, expected: list[str]) -> None:
    levels = 128 + deviation * (2 * (np.indices((16, 16)).sum(0) % 2) - 1)
    image = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    assert kinds(image) == expected


def test_first_flaw_of_a_black_image_is_dark() -> None:
    assert kinds(Image.new("RGB", (8, 8))) == ["too dark", "flat", "blurred"]
