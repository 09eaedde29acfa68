"""From the content of a file to samples: what the decoding processes of a build do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from PIL import Image, ImageOps

from trainer.data.hooks import (
    KEEP,
    FaceFinder,
    crop_face,
    perceptual_hash,
    picture_flaws,
    shape_flaw,
    thumbnail,
)
from trainer.data.images import ImageError, decode_reduced, encode, pixel_digest, to_square
from trainer.data.store import Rejected, Sample

SHOWN_SIZE = 128  # pixels; rejected pictures are shown no larger


@dataclass(frozen=True)
class Options:
    """How a picture becomes a sample.

    Attributes:
        size: side of the samples, in pixels.
        crop: "center" or "none", see ``images.to_square``, or "face": the face of a cat.
        faces: with "face": "best" takes one of each picture, "all" takes each.
        min_size: the least pixels of the shorter side of the original.
        keep: which checks are switched off, of ``hooks.KEEP``.
    """

    size: int
    crop: str
    min_size: int
    faces: str = "best"
    keep: tuple[str, ...] = ()


Results = list[Sample | Rejected]


def prepare(contents: list[bytes | str], options: Options) -> list[Results]:
    """For each content, or reason why there is none, what comes of it: one result or more."""
    return [[Rejected(content)] if isinstance(content, str) else samples_of(content, options) for content in contents]


def samples_of(content: bytes, options: Options) -> Results:
    """The samples in the file with this content, or why there are none."""
    # Faces may be small in their picture, and whether one is square shows in all of its pixels only.
    reduced = options.size if options.crop == "center" else None
    try:
        image, (width, height) = decode_reduced(content, reduced)
    except ImageError as error:
        return [Rejected(str(error))]
    shorter = min(width, height)
    if shorter < options.min_size:
        reason = f"too small: {width}x{height}, the shorter side needs {options.min_size}"
        return [Rejected(reason, shorter, _shown(image))]
    off = {KEEP[word] for word in options.keep}
    flaw = shape_flaw(width, height)
    if flaw is not None and flaw.kind not in off:
        return [Rejected(str(flaw), flaw.score, _shown(image))]
    try:
        squares = _squares(image, options)
    except ImageError as error:
        return [Rejected(str(error), None, _shown(image))]
    digest = pixel_digest(image)
    results: Results = []
    for number, square in enumerate(squares):
        flaws = [flaw for flaw in picture_flaws(square) if flaw.kind not in off]
        if flaws:
            results.append(Rejected(str(flaws[0]), flaws[0].score, _shown(square)))
            continue
        signature = b"" if "near-duplicate" in options.keep else _signature(square)
        # Two faces of one picture are no duplicates, and those of its copy are.
        own = digest if number == 0 else digest + b"%d" % number
        results.append(Sample(encode(square), own, width, height, signature))
    return results


def _squares(image: Image.Image, options: Options) -> list[Image.Image]:
    if options.crop != "face":
        return [to_square(image, options.size, options.crop)]
    faces = _finder().find(image)
    if not faces:
        raise ImageError("no face")
    return [crop_face(image, face, options.size) for face in (faces if options.faces == "all" else faces[:1])]


@functools.cache
def _finder() -> FaceFinder:
    """One for each process: it takes long to load."""
    return FaceFinder()


def _signature(square: Image.Image) -> bytes:
    return perceptual_hash(square).to_bytes(8, "big") + thumbnail(square).tobytes()


def _shown(image: Image.Image) -> bytes:
    """A rejected picture in small, whole, on white."""
    side = min(max(image.size), SHOWN_SIZE)
    return encode(ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, color="white"))
