"""Detect cats' faces in photos, and crop them upright.

OpenCV's two cascades for frontal cat faces (Joseph Howse, 2014) propose squares. Each proposal is searched again at
several angles: a face is detected at neighbouring angles, whose mean is its tilt, while a pattern of fur mostly is
not. Then EfficientNet-Lite0 classifies the square, because the cascades also detect dogs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catgan.command import UserError
from trainer.data.images import ImageError

CATS = slice(281, 294)
"""ImageNet's classes of cats, from tabby to cheetah. With the large cats, because kittens often resemble a lynx."""

SEARCH_SIDE = 400
"""The longer side of the copy in which faces are searched, in pixels."""

SMALLEST = 0.1
"""The side of the smallest face that is detected, as a fraction of the photo's longer side."""

MIN_SCORE = 2.0
"""On 200 photos of cats and 60 of dogs 150 of 151 crops showed a face; 1 adds a wrong one, 3 loses a face in 20."""

MIN_CAT = 0.2
"""Dogs that the cascades detect have a probability below 0.05, cats above 0.5, with few exceptions."""

MARGIN = 0.5
"""What a crop shows beyond the face, as a fraction of the face's side: 0.5 is the whole head with ears, as in AFHQ."""

LIFT = 0.1
"""How far the crop's centre is above the face's, as a fraction of the face's side: ears need more room than chins."""

_CASCADES = ("haarcascade_frontalcatface.xml", "haarcascade_frontalcatface_extended.xml")
_SCALE_STEP = 1.1  # from one size of the detector's window to the next; 1.2 loses a tenth of the faces
_TILTED = (-20, 20)  # degrees at which to search if no upright face is found
_TURNS = (-30, -20, -10, 0, 10, 20, 30)  # degrees by which each proposal is turned
_PATCH = 96  # pixels of the square around a proposal that is searched again; half of it is the face
_MIN_TILT = 4.0  # degrees; correcting less is not worth the loss of resampling twice
_CLASSIFIED_MARGIN = 0.4  # separates cats and dogs best, between 0.2 and 0.6; whole photos say little about one face
_CLASSIFIED_SIDE = 128  # pixels, the input of the classifier
_MAX_SHIFT = 0.15  # how far a crop may be moved back into the photo, as a fraction of its side
_MIN_MARGIN = 0.1  # of a crop that would otherwise reach beyond the photo

_Grey = NDArray[np.uint8]


class Detection(NamedTuple):
    """A square in which a cascade detects a face.

    ``x`` and ``y`` of its centre and ``side`` are in pixels, ``angle`` is in degrees clockwise from upright, and
    ``weight`` is the confidence of the cascade.
    """

    x: float
    y: float
    side: float
    angle: float
    weight: float


@dataclass(frozen=True)
class _View:
    """A part of a grey image to search: turned by ``angle`` degrees about ``centre`` and scaled by ``zoom``.

    ``centre``, (x, y), becomes the centre of the view, which has ``size`` (width, height) in pixels.
    """

    centre: tuple[float, float]
    angle: float
    zoom: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Face:
    """A cat's face in a photo: a square with nine tenths of the head's width, without the tips of the ears."""

    x: float
    """Of the centre, in pixels from the photo's left edge."""
    y: float
    """Of the centre, in pixels from the photo's upper edge."""
    side: float
    """Of the square, in pixels of the photo."""
    angle: float
    """The head's tilt in degrees, clockwise; 0 is upright."""
    score: float
    """The sum of the weights of both cascades at all angles; ``MIN_SCORE`` or more."""
    cat: float
    """The classifier's probability of a cat, ``MIN_CAT`` to 1."""


class FaceFinder:
    """Detects cats' faces. Cascades and network are loaded at the first use in each process, so it is cheap to pickle.

    Args:
        classifier: gives the probability that a square image shows a cat; None uses EfficientNet-Lite0.
    """

    def __init__(self, classifier: Callable[[Image.Image], float] | None = None) -> None:
        self._given_classifier = classifier

    def __reduce__(self) -> tuple[Any, ...]:
        return FaceFinder, (self._given_classifier,)

    def load(self) -> None:
        """Load what ``find`` needs, to fail early if it is missing. The first call on a machine exports the network.

        Raises:
            UserError: OpenCV is missing or lacks the cascades (OpenCV 5), or the network or onnxruntime is missing.
        """
        _ = self._cascades, self._classifier

    def find(self, image: Image.Image) -> list[Face]:
        """The frontal faces in an RGB photo, sorted by side times score, the best first. Deterministic.

        Raises:
            UserError: see ``load``.
        """
        scale = SEARCH_SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        grey = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L"))
        for angles in ((0,), _TILTED):
            proposals = suppress_overlaps(found for angle in angles for found in self._search(grey, angle))
            refined = suppress_overlaps(self._refine(grey, proposal) for proposal in proposals)
            faces = [self._classify(image, found, scale) for found in refined if found.weight >= MIN_SCORE]
            if faces := [face for face in faces if face.cat >= MIN_CAT]:
                return sorted(faces, key=lambda face: -face.side * face.score)
        return []

    def _search(self, grey: _Grey, angle: float) -> list[Detection]:
        """Search the whole image, turned by ``angle``."""
        height, width = grey.shape
        cos, sin = (abs(part(math.radians(angle))) for part in (math.cos, math.sin))
        bounds = (math.ceil(width * cos + height * sin), math.ceil(width * sin + height * cos))
        view = _View((width / 2, height / 2), angle, 1.0, bounds)
        return self._detect(grey, view, SMALLEST * max(width, height), min(width, height))

    def _refine(self, grey: _Grey, proposal: Detection) -> Detection:
        """Search around a proposal at all angles. Returns the weighted mean of the detections."""
        zoom = _PATCH / 2 / proposal.side
        detections = [
            found
            for turn in _TURNS
            for found in self._detect(
                grey,
                _View((proposal.x, proposal.y), proposal.angle + turn, zoom, (_PATCH, _PATCH)),
                _PATCH / 3,
                _PATCH * 2 / 3,
            )
            if math.hypot(found.x - proposal.x, found.y - proposal.y) < proposal.side / 3
        ]
        weights = np.array([max(found.weight, 0.0) for found in detections])
        if not weights.sum():
            return proposal._replace(weight=0.0)
        x, y, side, angle, _ = np.average(np.array(detections), axis=0, weights=weights)
        return Detection(float(x), float(y), float(side), float(angle), float(weights.sum()))

    def _detect(self, grey: _Grey, view: _View, min_side: float, max_side: float) -> list[Detection]:
        """The faces of ``min_side`` to ``max_side`` pixels in a view of ``grey``, in coordinates of ``grey``."""
        import cv2

        turn: NDArray[np.float64] = np.array(cv2.getRotationMatrix2D(view.centre, view.angle, view.zoom), np.float64)
        turn[:, 2] += np.subtract(view.size, np.multiply(view.centre, 2)) / 2
        # Replicate the photo's border: the cascades would detect the edge of a black one.
        pixels = cv2.warpAffine(grey, turn, view.size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        back = cv2.invertAffineTransform(turn)
        sizes = (round(min_side),) * 2, (round(max_side),) * 2
        found = []
        for cascade in self._cascades:
            boxes, _, weights = cascade.detectMultiScale3(pixels, _SCALE_STEP, 2, 0, *sizes, outputRejectLevels=True)
            for (left, top, side, _), weight in zip(boxes, np.ravel(weights), strict=True):
                x, y = back @ (left + side / 2, top + side / 2, 1.0)
                found.append(Detection(float(x), float(y), side / view.zoom, view.angle, float(weight)))
        return found

    def _classify(self, image: Image.Image, found: Detection, scale: float) -> Face:
        """The face of a detection in a copy of ``image`` that was resized by ``scale``."""
        x, y, side = found.x / scale, found.y / scale, found.side / scale
        angle = found.angle if abs(found.angle) >= _MIN_TILT else 0.0
        width = min(side * (1 + _CLASSIFIED_MARGIN), *image.size)
        left, top = (min(max(c - width / 2, 0), most - width) for c, most in zip((x, y), image.size, strict=True))
        box = (left, top, left + width, top + width)
        crop = image.resize((_CLASSIFIED_SIDE,) * 2, Image.Resampling.BILINEAR, box=box)
        return Face(x, y, side, angle, found.weight, self._classifier(crop))

    @cached_property
    def _cascades(self) -> list[Any]:
        try:
            import cv2
        except ModuleNotFoundError:
            raise UserError("finding faces needs OpenCV: pip install 'catgan[train]'") from None
        if not hasattr(cv2, "CascadeClassifier"):
            raise UserError(
                f"OpenCV {cv2.__version__} has no cascades: pip install 'opencv-python-headless<5' in its place"
            )
        from cv2.data import haarcascades

        cv2.setNumThreads(1)
        return [cv2.CascadeClassifier(haarcascades + name) for name in _CASCADES]

    @cached_property
    def _classifier(self) -> Callable[[Image.Image], float]:
        return self._given_classifier or _efflite0_classifier()


def _efflite0_classifier() -> Callable[[Image.Image], float]:
    import torch

    from trainer.features.extractors import imagenet_classifier

    classify = imagenet_classifier(threads=1)

    def cat_probability(image: Image.Image) -> float:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return float(classify(pixels[None])[0, CATS].sum())

    return cat_probability


def suppress_overlaps(detections: Iterable[Detection]) -> list[Detection]:
    """Non-maximum suppression: drop each detection whose overlap with one of greater weight is 1/3 or more of their
    union."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda detection: -detection.weight):
        if all(_overlap(detection, other) < 1 / 3 for other in kept):
            kept.append(detection)
    return kept


def _overlap(a: Detection, b: Detection) -> float:
    """Intersection over union; tilts are ignored."""
    shared = [min(a.side, b.side, (a.side + b.side) / 2 - abs(p - q)) for p, q in ((a.x, b.x), (a.y, b.y))]
    common = max(shared[0], 0) * max(shared[1], 0)
    return common / (a.side**2 + b.side**2 - common)


def crop_face(image: Image.Image, face: Face, size: int) -> Image.Image:
    """The head of ``face`` as an upright image of ``size`` x ``size`` (Lanczos, with antialiasing).

    A crop that would reach beyond the photo is moved back by at most 0.15 of its side and shrunk to a margin of 0.1 at
    least; if a tilted crop does not fit even so, it is turned by half of the tilt, or not at all. All pixels come from
    the photo.

    Raises:
        ImageError: the face is too close to the photo's edge.
    """
    for tilt in (face.angle, face.angle / 2, 0.0):
        angle = math.radians(tilt)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = face.x + LIFT * face.side * sin, face.y - LIFT * face.side * cos
        # Half the side of the upright box around a tilted square of side 1. A crop of side s fits if its centre, moved
        # by at most _MAX_SHIFT * s, is half * s or more from each edge.
        half = (abs(cos) + abs(sin)) / 2
        edge_distance = min(x, y, image.width - x, image.height - y)
        side = min((1 + MARGIN) * face.side, edge_distance / (half - _MAX_SHIFT), min(image.size) / (2 * half))
        if side >= (1 + _MIN_MARGIN) * face.side:
            break
    else:
        raise ImageError("face at the edge: the photo ends too close to it")
    x = min(max(x, half * side), image.width - half * side)
    y = min(max(y, half * side), image.height - half * side)
    if tilt:
        # Turn at a scale that needs no antialiasing, four times the crop's or the photo's own, then resize.
        shrink = max(1, int(side / (4 * size)))
        pixels = max(1, int(side / shrink))
        step = side / shrink / pixels
        left, top = ((x - side / 2 * (cos - sin)) / shrink, (y - side / 2 * (cos + sin)) / shrink)
        turn = (cos * step, -sin * step, left, sin * step, cos * step, top)
        square = image.reduce(shrink).transform((pixels,) * 2, Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC)
    else:
        pixels = max(1, int(side))
        left, top = (round(c - pixels / 2) for c in (x, y))
        square = image.crop((left, top, left + pixels, top + pixels))
    return square.resize((size, size), Image.Resampling.LANCZOS)
