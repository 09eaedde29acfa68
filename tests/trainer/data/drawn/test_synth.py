"""Drawn cats: determined by seed and index, alike at every size, and with every trait visible in the pixels."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from catgan.command import UserError
from trainer.data.drawn.coats import BACKGROUNDS, COATS, Cat, random_cat
from trainer.data.drawn.portrait import paint
from trainer.data.drawn.scene import Noise, random_noise
from trainer.data.drawn.synth import CHUNK, draw, draw_many

Pixels = NDArray[np.float64]


@pytest.fixture
def cat() -> Cat:
    """A plain, upright cat that looks straight ahead, with the light from above."""
    still: dict[str, Any] = dict.fromkeys(
        ("skew", "gaze", "tilt_degrees", "yaw", "pitch", "offset_x", "light_degrees", "warmth"), 0.0
    )
    chosen: dict[str, Any] = {
        "coat": "solid",
        "colour": "grey",
        "stripes": 0.0,
        "white": 0.0,
        "odd_eye": None,
        "eye_open": 0.95,
    }
    return replace(
        _random_cat(5), **still, **chosen, shade=1.0, exposure=1.0, pupil=0.2, nose="black", background="wall"
    )


@pytest.fixture
def noise() -> Noise:
    return random_noise(np.random.Generator(np.random.PCG64(11)))


def _random_cat(index: int) -> Cat:
    return random_cat(np.random.Generator(np.random.PCG64([0, index])))


def _show(cat: Cat, noise: Noise, **changes: Any) -> Pixels:
    return paint(replace(cat, **changes), noise, 64).astype(float)


def _shrink(image: NDArray[np.uint8], fold: int) -> Pixels:
    """Average blocks of ``fold`` x ``fold`` pixels in linear light."""
    n = len(image) // fold
    light = (image / 255.0) ** 2
    return np.sqrt(light.reshape(n, fold, n, fold, 3).mean((1, 3))) * 255


def _changed(a: Pixels, b: Pixels) -> NDArray[np.bool_]:
    return np.abs(a - b).max(axis=2) > 12


@pytest.mark.parametrize("size", [16, 33, 64, 200])
def test_an_image_has_the_requested_size(size: int) -> None:
    image, _ = draw(0, 0, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.std() > 20


def test_seed_and_index_determine_the_image() -> None:
    one, attributes = draw(3, 7, 64)
    again, same_attributes = draw(3, 7, 64)
    assert np.array_equal(one, again)
    assert attributes == same_attributes
    for other in (draw(3, 8, 64), draw(4, 7, 64), draw(7, 3, 64)):
        assert not np.array_equal(one, other[0])
        assert attributes != other[1]


def test_attributes_are_all_traits_and_fit_into_json() -> None:
    _, attributes = draw(0, 12, 32)
    assert json.loads(json.dumps(attributes)) == attributes
    assert asdict(Cat(**attributes)) == attributes


@pytest.mark.parametrize(("fine", "coarse"), [(128, 64), (256, 64), (128, 32)])
def test_the_same_cat_at_every_size(fine: int, coarse: int) -> None:
    for index in range(4):
        shrunk = _shrink(draw(0, index, fine)[0], fine // coarse)
        assert np.abs(shrunk - draw(0, index, coarse)[0]).mean() < 8
        assert np.abs(shrunk - draw(0, index + 100, coarse)[0]).mean() > 20


def test_processes_change_neither_images_nor_order() -> None:
    num = 2 * CHUNK + 5
    alone = list(draw_many(1, num, 16, processes=1))
    shared = list(draw_many(1, num, 16, processes=2))
    assert len(alone) == len(shared) == num
    for index, (one, other) in enumerate(zip(alone, shared, strict=True)):
        assert np.array_equal(one[0], other[0]), index
        assert one[1] == other[1]
    assert np.array_equal(shared[CHUNK + 1][0], draw(1, CHUNK + 1, 16)[0])


def test_closing_the_iterator_ends_its_processes() -> None:
    before = set(multiprocessing.active_children())
    images = draw_many(0, 100_000, 16, processes=2)
    assert len(list(islice(images, 3))) == 3
    assert set(multiprocessing.active_children()) - before
    images.close()  # type: ignore[attr-defined]
    assert not set(multiprocessing.active_children()) - before


def test_zero_cats_are_no_error() -> None:
    assert list(draw_many(0, 0, 64)) == []


@pytest.mark.parametrize("size", [-1, 0, 15, 1025])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=rf"size {size} .* 16 to 1024"):
        draw(0, 0, size)
    with pytest.raises(UserError, match=rf"size {size} "):
        draw_many(0, 10, size)  # at the call, not at the first image


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="seed -1"):
        draw(-1, 0, 64)
    with pytest.raises(UserError, match="-2"):
        draw(0, -2, 64)
    with pytest.raises(UserError, match="processes is 0"):
        draw_many(0, 10, 64, processes=0)


def test_every_coat_and_background_appears_among_500() -> None:
    cats = [_random_cat(index) for index in range(500)]
    assert {cat.coat for cat in cats} == set(COATS)
    assert {cat.background for cat in cats} == set(BACKGROUNDS)
    assert {cat.head for cat in cats} == {"wedge", "standard", "round"}
    assert any(cat.odd_eye for cat in cats)
    assert all(cat.eyes == "blue" for cat in cats if cat.coat == "colourpoint")
    assert all(cat.stripes > 0 for cat in cats if cat.colour == "orange" and cat.coat in ("tabby", "bicolour"))


def test_images_differ_from_each_other() -> None:
    images = np.stack([draw(0, index, 32)[0].astype(float) for index in range(60)])
    distances = np.abs(images[:, None] - images[None]).mean((2, 3, 4))
    pairs = distances[np.triu_indices(60, 1)]
    assert pairs.mean() > 40
    assert pairs.min() > 10


def test_the_face_fills_the_image(cat: Cat, noise: Noise) -> None:
    """The pixels that change with the coat are the cat: at least half of the image, from near the top to the bottom."""
    body = _changed(_show(cat, noise, colour="black"), _show(cat, noise, colour="white"))
    assert 0.45 < body.mean() < 0.9
    assert np.flatnonzero(body.any(axis=1))[0] < 16
    assert body[-1].any()


def test_eye_colour_is_the_colour_of_both_eyes_and_of_nothing_else(cat: Cat, noise: Noise) -> None:
    blue, green = _show(cat, noise, eyes="blue"), _show(cat, noise, eyes="green")
    eyes = _changed(blue, green)
    assert 0.01 < eyes.mean() < 0.12
    left, right = eyes[:, :32].sum(), eyes[:, 32:].sum()
    assert min(left, right) > 0.6 * max(left, right)
    assert (blue[eyes][:, 2] - blue[eyes][:, 1]).mean() > 20
    assert (green[eyes][:, 1] - green[eyes][:, 2]).mean() > 20


def test_an_odd_eye_is_the_one_on_the_right(cat: Cat, noise: Noise) -> None:
    odd = _changed(_show(cat, noise, eyes="amber"), _show(cat, noise, eyes="amber", odd_eye="blue"))
    assert odd[:, 32:].sum() > 10
    assert not odd[:, :32].any()


def test_a_wider_pupil_darkens_the_eye_and_a_half_closed_eye_shows_less(cat: Cat, noise: Noise) -> None:
    eyes = _changed(_show(cat, noise, eyes="blue"), _show(cat, noise, eyes="yellow"))
    assert _show(cat, noise, pupil=0.7)[eyes].mean() < _show(cat, noise, pupil=0.1)[eyes].mean() - 15
    sleepy = {"eye_open": 0.4}
    closed = _changed(_show(cat, noise, eyes="blue", **sleepy), _show(cat, noise, eyes="yellow", **sleepy))
    assert closed.sum() < 0.8 * eyes.sum()


def test_coats_have_the_colour_of_their_name(cat: Cat, noise: Noise) -> None:
    def cheek(colour: str) -> NDArray[np.float64]:
        rows, columns = slice(38, 46), slice(14, 22)
        return _show(cat, noise, colour=colour)[rows, columns].mean((0, 1))

    orange, black, white, grey = (cheek(colour) for colour in ("orange", "black", "white", "grey"))
    assert orange[0] - orange[2] > black[0] - black[2] + 40
    assert white.mean() > grey.mean() + 40
    assert grey.mean() > black.mean() + 30


def test_markings_are_visible(cat: Cat, noise: Noise) -> None:
    brow = (slice(19, 26), slice(22, 42))
    plain = _show(cat, noise, coat="tabby", colour="orange", stripes=0.01)
    striped = _show(cat, noise, coat="tabby", colour="orange", stripes=1.0)
    assert 0.15 < ((plain - striped)[brow].mean(axis=2) > 15).mean() < 0.8  # the M is there, and is not everything
    muzzle = (slice(44, 50), slice(28, 36))
    tuxedo = _show(cat, noise, coat="tuxedo", colour="black", white=0.3)
    assert tuxedo[muzzle].mean() > _show(cat, noise, colour="black")[muzzle].mean() + 40
    point = _show(cat, noise, coat="colourpoint", colour="chocolate")
    assert point[38:46, 10:16].mean() > point[40:44, 30:34].mean() + 30  # cheek pale, mask dark


def test_light_comes_from_its_direction(cat: Cat, noise: Noise) -> None:
    left, right = _show(cat, noise, light_degrees=-80), _show(cat, noise, light_degrees=80)
    brighter = (left - right).mean(axis=2)[24:52]
    assert brighter[:, 12:22].mean() > 8
    assert brighter[:, 42:52].mean() < -8
    warm, cold = _show(cat, noise, warmth=1.0), _show(cat, noise, warmth=-1.0)
    assert ((warm - cold)[..., 0] - (warm - cold)[..., 2]).mean() > 20


def test_the_head_turns_and_leans(cat: Cat, noise: Noise) -> None:
    def eyes(**pose: float) -> tuple[Pixels, Pixels]:
        """(row, column) of the middle of the left and of the right eye."""
        places = np.argwhere(_changed(_show(cat, noise, eyes="blue", **pose), _show(cat, noise, eyes="yellow", **pose)))
        middle = places[:, 1].mean()
        return places[places[:, 1] < middle].mean(axis=0), places[places[:, 1] >= middle].mean(axis=0)

    left, right = eyes()
    assert abs(left[0] - right[0]) < 1
    assert abs(left[1] + right[1] - 63) < 2
    leaning_left, leaning_right = eyes(tilt_degrees=20.0)  # clockwise
    assert leaning_right[0] - leaning_left[0] > 4
    turned_left, turned_right = eyes(yaw=1.0)
    assert turned_left[1] > left[1] + 2
    assert turned_right[1] > right[1] + 2
    assert eyes(offset_x=0.1)[0][1] == pytest.approx(left[1] + 3.2, abs=0.7)
