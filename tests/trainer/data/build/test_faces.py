"""Faces: crops are upright, to scale and inside the photo; detections are merged, refined and classified."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models._meta import _IMAGENET_CATEGORIES

from catgan.command import UserError
from trainer.data.build import faces
from trainer.data.build.faces import CATS, Detection, Face, FaceFinder, crop_face, suppress_overlaps
from trainer.data.images import ImageError

UPRIGHT = Face(x=200.0, y=150.0, side=80.0, angle=0.0, score=20.0, cat=1.0)
WIDTH, HEIGHT = 400, 300


def sky(face: Face) -> Image.Image:
    """A photo whose blue is the distance from the face's centre along the head's axis: 128 there, more below.

    Red is the same across the head: 128 at the middle, more to the right. Both change by one per pixel.
    """
    angle = math.radians(face.angle)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    dx, dy = x - face.x, y - face.y
    across, down = dx * math.cos(angle) + dy * math.sin(angle), -dx * math.sin(angle) + dy * math.cos(angle)
    pixels = np.stack([128 + across, np.full_like(x, 60), 128 + down], axis=2)
    return Image.fromarray(np.rint(pixels.clip(1, 255)).astype(np.uint8))


@pytest.mark.parametrize("angle", [0.0, 20.0, -35.0])
@pytest.mark.parametrize("size", [60, 10])
def test_a_crop_is_upright_centred_and_to_scale(angle: float, size: int):
    face = dataclasses.replace(UPRIGHT, angle=angle)
    crop = crop_face(sky(face), face, size)
    assert (crop.mode, crop.size) == ("RGB", (size, size))
    side = (1 + faces.MARGIN) * face.side
    steps = (np.arange(size) + 0.5) / size * side - side / 2
    pixels = np.asarray(crop, float)
    inner = slice(3, -3)  # the kernel has half a window at the borders
    expected = np.broadcast_to(128 + steps, (size, size))
    np.testing.assert_allclose(pixels[inner, inner, 0], expected[inner, inner], atol=1.6)
    np.testing.assert_allclose(pixels[inner, inner, 2], expected.T[inner, inner] - faces.LIFT * face.side, atol=1.6)
    assert (pixels[..., 1] == 60).all()


@pytest.mark.parametrize("angle", [0.0, 25.0])
def test_shrinking_smooths(angle: float):
    checks = np.indices((HEIGHT, WIDTH)).sum(0) % 2 * 255
    crop = crop_face(
        Image.fromarray(checks.astype(np.uint8)).convert("RGB"), dataclasses.replace(UPRIGHT, angle=angle), 12
    )
    assert np.asarray(crop, float)[2:-2, 2:-2].std() < 12
    assert np.asarray(crop, float).mean() == pytest.approx(127.5, abs=4)


@pytest.mark.parametrize("angle", [0.0, 15.0])
@pytest.mark.parametrize(("x", "y"), [(52, 150), (348, 150), (200, 53), (200, 248)])
def test_near_an_edge_the_crop_moves_back_into_the_photo(x: float, y: float, angle: float):
    face = dataclasses.replace(UPRIGHT, x=x, y=y, angle=angle)
    # Pillow and OpenCV fill with black what is outside; nothing in this photo is darker than 90.
    photo = Image.fromarray(np.random.default_rng(0).integers(100, 110, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    assert np.asarray(crop_face(photo, face, 64)).min() >= 90
    crop = np.asarray(crop_face(sky(face), face, 64), float)
    # The middle of the face is in the crop, away from its borders by a third.
    assert crop[0, :, 0].shape == (64,)
    assert abs(crop[32, 32, [0, 2]] - 128).max() < face.side / 3


@pytest.mark.parametrize(("x", "y"), [(30, 150), (200, 30), (390, 150), (200, 290), (3, 3)])
def test_a_face_at_the_edge_is_refused_with_the_reason(x: float, y: float):
    with pytest.raises(ImageError, match="face at the edge: "):
        crop_face(sky(UPRIGHT), dataclasses.replace(UPRIGHT, x=x, y=y), 64)


def test_a_face_that_fills_the_photo_is_cropped_tighter():
    photo = sky(UPRIGHT)
    face = dataclasses.replace(UPRIGHT, side=220.0)
    assert (1 + faces.MARGIN) * face.side > HEIGHT
    crop = np.asarray(crop_face(photo, face, 300))
    np.testing.assert_array_equal(crop, np.asarray(photo.crop((50, 0, 350, 300))))
    with pytest.raises(ImageError):
        crop_face(photo, dataclasses.replace(face, side=280.0), 300)


def test_suppression_keeps_the_strongest_of_overlapping_detections():
    strong, near = Detection(50, 50, 40, 0, 3.0), Detection(55, 52, 44, 20, 2.0)
    apart, inside = Detection(100, 50, 40, 0, 1.0), Detection(50, 50, 20, 0, 2.5)
    assert suppress_overlaps([near, apart, strong, inside]) == [strong, inside, apart]
    assert suppress_overlaps([]) == []


@pytest.mark.parametrize(("x", "kept"), [(69, 1), (71, 2)])
def test_suppression_is_by_intersection_over_union(x: float, kept: int):
    """Squares of side 40 that share a half have a third of their union in common."""
    assert len(suppress_overlaps([Detection(50, 50, 40, 0, 2.0), Detection(x, 50, 40, 0, 1.0)])) == kept


class Cascade:
    """In place of OpenCV's: detects the bar of ``bar`` as a face if it is upright enough."""

    def __init__(self, weight: float = 2.0) -> None:
        self.weight = weight

    def detectMultiScale3(
        self, view: Any, step: float, neighbours: int, flags: int, least: Any, most: Any, outputRejectLevels: bool
    ) -> Any:
        found = blob(view)
        if found is None:
            return (), (), ()
        x, y, side, tilt = found
        if abs(tilt) > 15 or not least[0] <= side <= most[0]:
            return (), (), ()
        return np.array([[x - side / 2, y - side / 2, side, side]]), np.array([20]), np.array([self.weight])


def blob(view: np.ndarray) -> tuple[float, float, float, float] | None:
    """Centre, side and clockwise tilt of a bar with a bright upper end, seen as a face of twice the bar's length."""
    ys, xs = np.nonzero(view > 60)
    if len(ys) < 20:
        return None
    length = np.ptp(np.stack([xs, ys]), axis=1)
    heads = np.nonzero(view > 200)
    x, y = xs.mean(), ys.mean()
    if not len(heads[0]):
        return None
    tilt = math.degrees(math.atan2(heads[1].mean() - x, y - heads[0].mean()))
    return float(x), float(y), 2 * float(math.hypot(*length)), tilt


def bar(tilt: float, width: int = 800, height: int = 600) -> Image.Image:
    """A photo with a bar of length 80 at its centre: a face of side 160."""
    view = np.zeros((height, width), np.uint8)
    turn = math.radians(tilt)
    up = np.array([math.sin(turn), -math.cos(turn)])
    middle = np.array([width / 2, height / 2])
    for start, end, shade in ((-40, 10, 150), (10, 40, 255)):
        ends = [tuple(np.rint(middle + up * part).astype(int).tolist()) for part in (start, end)]
        cv2.line(view, *ends, shade, 9)
    return Image.fromarray(view).convert("RGB")


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> FaceFinder:
    finder = FaceFinder(classifier=lambda crop: 0.9)
    finder.__dict__["_cascades"] = [Cascade(), Cascade()]
    return finder


@pytest.mark.parametrize("tilt", [0, 10, 20, -30])
def test_a_tilted_face_is_found_with_its_tilt_in_pixels_of_the_photo(finder: FaceFinder, tilt: float):
    (face,) = finder.find(bar(tilt))
    assert (face.x, face.y) == (pytest.approx(400, abs=6), pytest.approx(300, abs=6))
    assert face.side == pytest.approx(160, rel=0.15)
    assert face.angle == pytest.approx(tilt, abs=6)
    assert face.cat == 0.9


def test_small_tilt_counts_as_none(finder: FaceFinder):
    assert finder.find(bar(2))[0].angle == 0.0


def test_weak_detection_is_dropped(finder: FaceFinder):
    finder.__dict__["_cascades"] = [Cascade(weight=0.1)]
    assert finder.find(bar(0)) == []


def test_classifier_sees_the_face_and_decides(finder: FaceFinder):
    seen = []

    def classify(crop: Image.Image) -> float:
        seen.append(crop)
        return faces.MIN_CAT - 0.01

    finder.__dict__["_classifier"] = classify
    assert finder.find(bar(0)) == []
    assert {crop.mode for crop in seen} == {"RGB"}
    assert all(blob(np.asarray(crop.convert("L"))) for crop in seen)
    finder.__dict__["_classifier"] = lambda crop: faces.MIN_CAT
    assert len(finder.find(bar(0))) == 1


def test_the_best_comes_first(finder: FaceFinder, monkeypatch: pytest.MonkeyPatch):
    small, large, sure = (
        Detection(100 * i + 50, 50, side, 0, weight)
        for i, (side, weight) in enumerate([(40, 8.0), (80, 8.0), (40, 18.0)])
    )
    monkeypatch.setattr(finder, "_search", lambda grey, angle: [small, large, sure])
    monkeypatch.setattr(finder, "_refine", lambda grey, find: find)
    found = finder.find(Image.new("RGB", (faces.SEARCH_SIDE, 100)))
    assert [(face.side, face.score) for face in found] == [(40, 18.0), (80, 8.0), (40, 8.0)]


def test_noise_and_plain_colours_have_no_face():
    finder = FaceFinder()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    for image in (
        noise,
        Image.new("RGB", (320, 200), "orange"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (900, 2)),
    ):
        assert finder.find(image) == []


def test_real_cascades_are_deterministic():
    """The texture of clouds gives the cascades something to detect."""
    grey = np.random.default_rng(1).integers(0, 256, (24, 32), dtype=np.uint8)
    photo = cv2.resize(grey, (400, 300), interpolation=cv2.INTER_CUBIC)
    first, second = (FaceFinder()._search(photo, 20) for _ in range(2))
    assert first == second


def test_classes_of_cats_in_imagenet():
    cats = _IMAGENET_CATEGORIES[CATS]
    assert (cats[0], cats[-1]) == ("tabby", "cheetah")
    assert _IMAGENET_CATEGORIES[CATS.start - 1] == "grey fox"
    assert _IMAGENET_CATEGORIES[CATS.stop] == "brown bear"


def test_cat_probability_is_the_sum_over_classes_of_cats(monkeypatch: pytest.MonkeyPatch):
    def classifier(threads: int) -> Any:
        assert threads == 1

        def classify(images: torch.Tensor) -> torch.Tensor:
            assert (images.dtype, images.shape[1]) == (torch.uint8, 3)
            # The probability of a tabby is the top left pixel's red, the rest is a dog's (class 207).
            share = images[:, 0, 0, 0].float() / 255
            result = torch.zeros(len(images), 1000)
            result[:, 281], result[:, 207] = share, 1 - share
            return result

        return classify

    monkeypatch.setattr("trainer.features.extractors.imagenet_classifier", classifier)
    cat_probability = FaceFinder()._classifier
    assert cat_probability(Image.new("RGB", (8, 8), (51, 255, 255))) == pytest.approx(0.2)
    assert cat_probability(Image.new("RGB", (8, 8), (255, 0, 0))) == pytest.approx(1.0)


def test_pickled_finder_does_not_contain_what_it_loaded(finder: FaceFinder):
    used = FaceFinder()
    used.__dict__["_cascades"] = [object()]
    copy = pickle.loads(pickle.dumps(used))
    assert isinstance(copy, FaceFinder)
    assert "_cascades" not in copy.__dict__


def test_opencv_without_cascades_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(UserError, match="opencv-python-headless<5"):
        FaceFinder(classifier=lambda crop: 1.0).load()
