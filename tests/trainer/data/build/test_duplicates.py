"""Hashes of drawn cats and their copies; the search against a brute-force reference on random data."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from trainer.data.build import duplicates
from trainer.data.build.duplicates import MAX_BITS, near_duplicates, perceptual_hash, thumbnail
from trainer.data.drawn.synth import draw

Found = dict[int, tuple[int, int]]
THUMBNAIL = np.arange(12, dtype=np.uint8)
OTHER_THUMBNAIL = THUMBNAIL[::-1].copy()


def cat(index: int, size: int = 64) -> Image.Image:
    return Image.fromarray(draw(0, index, size)[0])


def bits(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def recompressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": recompressed,
    "half": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS).resize(p.size),
    "crop": lambda p: p.crop((1, 0, p.width, p.height - 1)).resize(p.size, Image.Resampling.LANCZOS),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.1),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.9),
    "colour": lambda p: p.convert("RGB", (1, 0, 0, 0, 0, 0.97, 0, 0, 0, 0, 0.94, 0)),
}


def found(images: list[Image.Image], pixels: list[int] | None = None) -> Found:
    return near_duplicates(
        np.array([perceptual_hash(p) for p in images], np.uint64),
        np.stack([thumbnail(p) for p in images]),
        np.array(pixels or [0] * len(images)),
        np.arange(len(images)),
    )


def search(
    hashes: list[int], thumbnails: list[NDArray[np.uint8]] | None = None, pixels: list[int] | None = None
) -> Found:
    n = len(hashes)
    return near_duplicates(
        np.array(hashes, np.uint64),
        np.stack(thumbnails or [THUMBNAIL] * n) if n else np.zeros((0, 12), np.uint8),
        np.array(pixels or [0] * n),
        np.arange(n),
    )


def brute_force(hashes: NDArray[np.uint64], thumbnail_of: list[int], order: list[int]) -> Found:
    """The definition in the docstring of ``near_duplicates``, taken literally."""
    kept: list[int] = []
    dropped: Found = {}
    for i in order:
        for k in kept:
            distance = bits(int(hashes[i]), int(hashes[k]))
            if distance <= MAX_BITS and thumbnail_of[i] == thumbnail_of[k]:
                dropped[i] = (k, distance)
                break
        else:
            kept.append(i)
    return dropped


def test_hash_of_a_wave() -> None:
    """A cosine along x has one frequency: besides the mean, only its bit is above the median, which is 0."""
    wave = 80 + 50 * np.cos(np.pi / 32 * 3 * (np.arange(32) + 0.5))
    image = Image.fromarray(np.rint(wave).astype(np.uint8)[None].repeat(32, axis=0)).convert("RGB")
    frequencies = perceptual_hash(image)
    assert frequencies >> 63, "the first bit is the mean"
    assert frequencies >> 60 & 1, "the fourth is 3 half waves along x"
    upside_down = Image.fromarray(255 - np.asarray(image))
    assert not perceptual_hash(upside_down) >> 60 & 1


def test_half_of_the_bits_are_set() -> None:
    hashes = [perceptual_hash(cat(i)) for i in range(20)]
    assert [value.bit_count() for value in hashes] == [32] * 20
    assert len(set(hashes)) == 20


@pytest.mark.parametrize("scale", [0.5, 0.8])
def test_hash_ignores_contrast_brightness_and_size(scale: float) -> None:
    for i in range(10):
        image = cat(i, 128)
        changed = image.point(lambda value: round(scale * value + 20)).resize((64, 64), Image.Resampling.LANCZOS)
        assert bits(perceptual_hash(image), perceptual_hash(changed)) <= 4


def test_thumbnail_is_the_average_of_each_part() -> None:
    pixels = np.asarray(cat(0, 64))
    expected = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))
    small = thumbnail(cat(0, 64))
    assert (small.shape, small.dtype) == ((8, 8, 3), np.uint8)
    assert np.abs(small - expected).max() <= 1


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_drawn_cats_are_found(copy: str) -> None:
    images = [cat(i) for i in range(20)]
    copies = [COPIES[copy](p) for p in images]
    dropped = found(images + copies)
    assert {i: kept for i, (kept, _) in dropped.items()} == {20 + i: i for i in range(20)}


def test_other_and_mirrored_cats_are_no_duplicates() -> None:
    images = [cat(i, 32) for i in range(50)]
    assert found(images + [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in images]) == {}


def test_similar_hashes_need_similar_thumbnails() -> None:
    assert search([0, 0, 1], [THUMBNAIL, OTHER_THUMBNAIL, THUMBNAIL]) == {2: (0, 1)}


def test_thumbnails_compare_up_to_brightness_and_contrast() -> None:
    small = thumbnail(cat(0)).ravel()
    noisy = (small.astype(int) + np.random.default_rng(0).integers(-60, 61, small.shape)).clip(0, 255).astype(np.uint8)
    assert search([0, 0, 0], [small, small // 2 + 30, noisy]) == {1: (0, 0)}


def test_image_of_one_colour_has_no_duplicates() -> None:
    flat = np.full(12, 9, np.uint8)
    assert search([0, 0, 0], [flat, flat, THUMBNAIL]) == {}


@pytest.mark.parametrize(("distance", "dropped"), [(MAX_BITS, {1: (0, MAX_BITS)}), (MAX_BITS + 1, {})])
def test_limit_of_the_hamming_distance(distance: int, dropped: Found) -> None:
    assert search([0, 2**distance - 1]) == dropped


def test_no_image_and_one_image() -> None:
    assert search([]) == {}
    assert search([5]) == {}


def test_largest_is_kept_then_the_lowest_key() -> None:
    assert search([0, 0, 0], pixels=[10, 30, 20]) == {0: (1, 0), 2: (1, 0)}
    keys = np.array(["b", "a", "c"])
    hashes, small = np.zeros(3, np.uint64), np.stack([THUMBNAIL] * 3)
    assert near_duplicates(hashes, small, np.array([7, 7, 7]), keys) == {0: (1, 0), 2: (1, 0)}
    assert near_duplicates(hashes, small, np.array([7, 7, 8], np.uint32), keys) == {0: (2, 0), 1: (2, 0)}


def test_near_duplicates_are_not_transitive() -> None:
    """Each is 6 bits from the next, so only neighbours are near-duplicates: every second one is kept."""
    chain = [2 ** (6 * i) - 1 for i in range(10)]
    assert search(chain) == {1: (0, 6), 3: (2, 6), 5: (4, 6), 7: (6, 6), 9: (8, 6)}
    assert search(chain, pixels=[1, 9, 1, 1, 1, 1, 1, 1, 1, 1]) == {
        0: (1, 6),
        2: (1, 6),
        4: (3, 6),
        6: (5, 6),
        8: (7, 6),
    }


def test_of_two_kept_images_the_larger_is_reported() -> None:
    assert search([0, 0xFFFF, 0xFF], pixels=[1, 2, 0]) == {2: (1, 8)}


@pytest.fixture(params=[(10**9, 10**9), (0, 10**9), (0, 0)], ids=["1 part", "2 parts", "3 parts"])
def every_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits, so that few images go through every branch: halves down to 4, few candidates at a time."""
    monkeypatch.setattr(duplicates, "_BRUTE_FORCE", 4)
    monkeypatch.setattr(duplicates, "_LARGER_K", request.param)
    monkeypatch.setattr(duplicates, "_MAX_CANDIDATES", 5)
    monkeypatch.setattr(duplicates, "_MAX_CONFIRMED", 3)


def clusters(seed: int, num: int) -> tuple[NDArray[np.uint64], list[int]]:
    """Hashes within 9 bits of a few centres, so that pairs are on both sides of the limit; one of two thumbnails."""
    rng = np.random.default_rng(seed)
    hashes = rng.choice(rng.integers(0, 2**64, 1 + num // 8, dtype=np.uint64), num)
    for i in range(num):
        for bit in rng.choice(64, rng.integers(0, 10), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    return hashes, rng.integers(0, 2, num).tolist()


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("seed", range(2))
def test_search_equals_brute_force_in_any_order(seed: int) -> None:
    hashes, thumbnail_of = clusters(seed, 80)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 20, 80)
    expected = brute_force(hashes, thumbnail_of, sorted(range(80), key=lambda i: (-pixels[i], i)))
    assert 15 < len(expected) < 65
    small = np.stack([(THUMBNAIL, OTHER_THUMBNAIL)[index] for index in thumbnail_of])
    assert near_duplicates(hashes, small, pixels, np.arange(80)) == expected
    shuffled = rng.permutation(80)
    moved = near_duplicates(hashes[shuffled], small[shuffled], pixels[shuffled], shuffled)
    assert {int(shuffled[i]): (int(shuffled[k]), d) for i, (k, d) in moved.items()} == expected


@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40), st.sampled_from([(99, 99), (0, 99), (0, 0)]))
def test_search_finds_each_pair_once(seed: int, num: int, split: int, limits: tuple[int, int]) -> None:
    hashes, _ = clusters(seed, max(num, 1))
    a, b = np.arange(len(hashes))[:split], np.arange(len(hashes))[split:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_LARGER_K", limits)
        pairs = [pair for high, low in duplicates._close_between(hashes, a, b) for pair in zip(high, low, strict=True)]
    expected = [(i, j) for i in a for j in b if bits(int(hashes[i]), int(hashes[j])) <= MAX_BITS]
    assert sorted(pairs) == expected


def test_many_copies_of_one_image_form_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 images have 12 million pairs; each copy needs one, besides all pairs of the first few images."""
    compared = []

    def counted(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
        compared.append(len(a))
        return distances(a, b)

    distances = duplicates._distances
    monkeypatch.setattr(duplicates, "_distances", counted)
    monkeypatch.setattr(duplicates, "_BRUTE_FORCE", 64)
    dropped = search([0] * 5000)
    assert len(dropped) == 4999
    assert set(dropped.values()) == {(0, 0)}
    assert sum(compared) < 5000 + 64**2 / 2


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 30, 56])
def test_search_finds_bits_that_are_spread_over_many_parts(shift: int) -> None:
    hashes = np.array([0, 0xFF << shift, 0x1FF << shift if shift < 56 else 0x1FF << 55], np.uint64)
    ((high, low),) = [
        (high.tolist(), low.tolist())
        for high, low in duplicates._close_between(hashes, np.arange(1), np.arange(1, 3))
        if len(high)
    ]
    assert (high, low) == ([0], [1])
