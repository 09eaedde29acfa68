"""Cats' faces in photos, found and cut out upright.

OpenCV's two cascades for frontal cat faces (Joseph Howse, 2014) propose squares. Each is looked at again, turned this
way and that: a face is found at several angles next to each other, whose mean is its tilt, and a pattern of fur that
happens to look like one mostly is not. EfficientNet-Lite0 gives the second opinion, whether that is a cat at all,
because the cascades fire on dogs too.
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
"""ImageNet's classes of cats, from tabby to cheetah; the large ones because kittens are often taken for a lynx."""

SEARCH_SIDE = 400
"""The longest side of the copy that is searched for faces, in pixels."""

SMALLEST = 0.1
"""The side of the smallest face that is found, as a part of the photo's longest side."""

MIN_SCORE = 2.0
"""On 200 photos of cats and 60 of dogs 150 of 151 crops showed a face; 1 adds a wrong one, 3 loses a face in 20."""

MIN_CAT = 0.2
"""Dogs that look like cats to the cascades are below 0.05, and cats above 0.5, with few exceptions."""

MARGIN = 0.5
"""What a crop shows beyond the face, as a part of the face's side: at 0.5 the whole head with its ears, as in AFHQ."""

LIFT = 0.1
"""How far above the face's middle the crop's is, as a part of the face's side: ears need more room than the chin."""

_CASCADES = ("haarcascade_frontalcatface.xml", "haarcascade_frontalcatface_extended.xml")
_STEP = 1.1  # from one size of the searched face to the next; with 1.2 a tenth of the faces is lost
_TILTED = (-20, 20)  # searched where no upright face is found
_TURNS = (-30, -20, -10, 0, 10, 20, 30)  # around each find
_PATCH = 96  # pixels of the square around a find that is looked at again; half of it is the face
_LEAST_TILT = 4.0  # degrees; less is not worth the loss of resampling twice
_OPINION_MARGIN = 0.4  # between 0.2 and 0.6 cats and dogs part best; whole photos tell little about one face
_OPINION_SIDE = 128  # pixels, what the network takes
_SHIFT = 0.15  # how far a crop may be shifted back into the photo, as a part of its side
_LEAST_MARGIN = 0.1  # of a crop that would otherwise reach beyond the photo

_Grey = NDArray[np.uint8]


class Square(NamedTuple):
    """Where a cascade sees a face: centre and side in pixels, degrees clockwise from upright, the cascade's weight."""

    x: float
    y: float
    side: float
    angle: float
    weight: float


@dataclass(frozen=True)
class Face:
    """A cat's face in a photo: a square nine tenths as wide as the head, without the ears' tips."""

    x: float
    """Of the centre, in pixels of the photo from its left edge."""
    y: float
    side: float
    """Of the square around the face, in pixels of the photo."""
    angle: float
    """The head's tilt in degrees, clockwise; 0 is upright."""
    score: float
    """The cascades' weights, summed over both of them and all angles; ``MIN_SCORE`` or more."""
    cat: float
    """The second opinion: the probability of a cat, ``MIN_CAT`` to 1."""


class FaceFinder:
    """Finds cats' faces. Cheap to make and to pickle: what it needs is loaded at the first use in each process.

    Args:
        opinion: the second opinion, a square picture's probability of showing a cat; None is EfficientNet-Lite0's.
    """

    def __init__(self, opinion: Callable[[Image.Image], float] | None = None) -> None:
        self._given_opinion = opinion

    def __reduce__(self) -> tuple[Any, ...]:
        return FaceFinder, (self._given_opinion,)

    def load(self) -> None:
        """Load now what ``find`` needs, to learn early that it cannot be had; also prepares the network, once.

        Raises:
            UserError: OpenCV is missing, or lacks the cascades (OpenCV 5); the network or onnxruntime is missing.
        """
        _ = self._cascades, self._opinion

    def find(self, image: Image.Image) -> list[Face]:
        """The frontal faces in an RGB photo, the best first: by side times score. The same for the same photo.

        Raises:
            UserError: see ``load``.
        """
        scale = SEARCH_SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        grey = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L"))
        for angles in ((0,), _TILTED):
            finds = merge(find for angle in angles for find in self._search(grey, angle))
            finds = merge(self._look_again(grey, find) for find in finds)
            faces = [self._judge(image, find, scale) for find in finds if find.weight >= MIN_SCORE]
            if faces := [face for face in faces if face.cat >= MIN_CAT]:
                return sorted(faces, key=lambda face: -face.side * face.score)
        return []

    def _search(self, grey: _Grey, angle: float) -> list[Square]:
        """The whole picture, turned by ``angle``."""
        height, width = grey.shape
        cos, sin = (abs(part(math.radians(angle))) for part in (math.cos, math.sin))
        canvas = (math.ceil(width * cos + height * sin), math.ceil(width * sin + height * cos))
        least = SMALLEST * max(width, height)
        return self._detect(grey, (width / 2, height / 2), angle, 1.0, canvas, least, min(width, height))

    def _look_again(self, grey: _Grey, find: Square) -> Square:
        """What the cascades see of one face at all angles, as one: the weighted mean, and the sum of the weights."""
        zoom = _PATCH / 2 / find.side
        views = [
            view
            for turn in _TURNS
            for view in self._detect(
                grey, (find.x, find.y), find.angle + turn, zoom, (_PATCH, _PATCH), _PATCH / 3, _PATCH * 2 / 3
            )
            if math.hypot(view.x - find.x, view.y - find.y) < find.side / 3
        ]
        weights = np.array([max(view.weight, 0.0) for view in views])
        if not weights.sum():
            return find._replace(weight=0.0)
        x, y, side, angle, _ = np.average(np.array(views), axis=0, weights=weights)
        return Square(float(x), float(y), float(side), float(angle), float(weights.sum()))

    def _detect(
        self,
        grey: _Grey,
        centre: tuple[float, float],
        angle: float,
        zoom: float,
        canvas: tuple[int, int],
        least: float,
        most: float,
    ) -> list[Square]:
        """What the cascades see in ``grey`` turned by ``angle`` about ``centre``, which goes to the canvas's middle."""
        import cv2

        turn: NDArray[np.float64] = np.array(cv2.getRotationMatrix2D(centre, angle, zoom), np.float64)
        turn[:, 2] += np.subtract(canvas, np.multiply(centre, 2)) / 2
        # Beyond the photo its edge goes on: a black border would be an edge to the cascades.
        view = cv2.warpAffine(grey, turn, canvas, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        back = cv2.invertAffineTransform(turn)
        sizes = (round(least),) * 2, (round(most),) * 2
        found = []
        for cascade in self._cascades:
            boxes, _, weights = cascade.detectMultiScale3(view, _STEP, 2, 0, *sizes, outputRejectLevels=True)
            for (left, top, side, _), weight in zip(boxes, np.ravel(weights), strict=True):
                x, y = back @ (left + side / 2, top + side / 2, 1.0)
                found.append(Square(float(x), float(y), side / zoom, angle, float(weight)))
        return found

    def _judge(self, image: Image.Image, find: Square, scale: float) -> Face:
        x, y, side = find.x / scale, find.y / scale, find.side / scale
        angle = find.angle if abs(find.angle) >= _LEAST_TILT else 0.0
        wide = min(side * (1 + _OPINION_MARGIN), *image.size)
        left, top = (min(max(c - wide / 2, 0), most - wide) for c, most in zip((x, y), image.size, strict=True))
        box = (left, top, left + wide, top + wide)
        crop = image.resize((_OPINION_SIDE,) * 2, Image.Resampling.BILINEAR, box=box)
        return Face(x, y, side, angle, find.weight, self._opinion(crop))

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
    def _opinion(self) -> Callable[[Image.Image], float]:
        return self._given_opinion or _efflite0_opinion()


def _efflite0_opinion() -> Callable[[Image.Image], float]:
    import torch

    from trainer.features.extractors import imagenet_classifier

    classify = imagenet_classifier(threads=1)

    def opinion(image: Image.Image) -> float:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return float(classify(pixels[None])[0, CATS].sum())

    return opinion


def merge(squares: Iterable[Square]) -> list[Square]:
    """The squares of greatest weight that overlap none of greater weight by a third of their union or more."""
    kept: list[Square] = []
    for square in sorted(squares, key=lambda square: -square.weight):
        if all(_overlap(square, other) < 1 / 3 for other in kept):
            kept.append(square)
    return kept


def _overlap(a: Square, b: Square) -> float:
    """Intersection over union; tilts are ignored."""
    shared = [min(a.side, b.side, (a.side + b.side) / 2 - abs(p - q)) for p, q in ((a.x, b.x), (a.y, b.y))]
    common = max(shared[0], 0) * max(shared[1], 0)
    return common / (a.side**2 + b.side**2 - common)


def crop_face(image: Image.Image, face: Face, size: int) -> Image.Image:
    """The head of ``face`` as ``size`` x ``size``, upright (Lanczos, smoothed where it shrinks).

    Where that reaches beyond the photo, the crop moves back by at most 0.15 of its side and shrinks to a margin of 0.1
    at least; where a turned crop has no room even so, it is turned by half of the tilt, or not at all. Nothing is ever
    made up.

    Raises:
        ImageError: the photo ends too close to the face.
    """
    for tilt in (face.angle, face.angle / 2, 0.0):
        angle = math.radians(tilt)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = face.x + LIFT * face.side * sin, face.y - LIFT * face.side * cos
        # Half of the upright box around a tilted square of side 1. A crop of side s fits if its centre, after a move
        # of at most _SHIFT * s, is half * s or more from each edge.
        half = (abs(cos) + abs(sin)) / 2
        near = min(x, y, image.width - x, image.height - y)
        side = min((1 + MARGIN) * face.side, near / (half - _SHIFT), min(image.size) / (2 * half))
        if side >= (1 + _LEAST_MARGIN) * face.side:
            break
    else:
        raise ImageError("face at the edge: the photo ends too close to it")
    x = min(max(x, half * side), image.width - half * side)
    y = min(max(y, half * side), image.height - half * side)
    if tilt:
        # Turned at a scale where that needs no smoothing, four times the crop's or the photo's own, then resized.
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
