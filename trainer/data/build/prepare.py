"""From the content of a file to samples: what the decoding processes of a build do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from PIL import Image, ImageOps

from trainer.data.build.clean import picture_flaws, shape_flaw
from trainer.data.build.duplicates import perceptual_hash, thumbnail
from trainer.data.build.faces import Face, FaceFinder, crop_face
from trainer.data.build.store import Rejected, Sample
from trainer.data.images import ImageError, decode_reduced, encode, pixel_digest, to_square

KEEP = {
    "near-duplicate": "near-duplicate",
    "narrow": "too narrow",
    "dark": "too dark",
    "flat": "flat",
    "blurred": "blurred",
}
"""What ``--keep`` calls the kinds of reasons that can be switched off: {word: kind}."""

SHOWN_SIZE = 128  # pixels; rejected pictures are shown no larger


@dataclass(frozen=True)
class Options:
    """How a picture becomes a sample.

    Attributes:
        size: side of the samples, in pixels.
        crop: "center" or "none", see ``images.to_square``, or "face": the face of a cat.
        faces: with "face": "best" takes one of each picture, "all" takes each.
        min_size: the least pixels of the shorter side of the original.
        keep: which checks are switched off, of ``KEEP``.
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
    digest = pixel_digest(image)
    results: Results = []
    for number, square in enumerate(_squares(image, options)):
        if isinstance(square, Rejected):
            results.append(square)
            continue
        flaws = [flaw for flaw in picture_flaws(square) if flaw.kind not in off]
        if flaws:
            results.append(Rejected(str(flaws[0]), flaws[0].score, _shown(square)))
            continue
        signature = b"" if "near-duplicate" in options.keep else _signature(square)
        # Two faces of one picture are no duplicates, and those of its copy are.
        own = digest if number == 0 else digest + b"%d" % number
        results.append(Sample(encode(square), own, width, height, signature))
    return results


def _squares(image: Image.Image, options: Options) -> list[Image.Image | Rejected]:
    """What is cut out of the picture, or why it is not: one or more."""
    if options.crop == "face":
        faces = _finder().find(image)
        if not faces:
            return [Rejected("no face", None, _shown(image))]
        cut = [_face(image, face, options) for face in faces]
        if options.faces == "all":
            return cut
        return [next((face for face in cut if isinstance(face, Image.Image)), cut[0])]
    try:
        return [to_square(image, options.size, options.crop)]
    except ImageError as error:
        return [Rejected(str(error), None, _shown(image))]


def _face(image: Image.Image, face: Face, options: Options) -> Image.Image | Rejected:
    if face.side < options.min_size:
        reason = f"too small: a face of {face.side:.0f} pixels, {options.min_size} are needed"
        return Rejected(reason, face.side, _shown(image))
    try:
        return crop_face(image, face, options.size)
    except ImageError as error:
        return Rejected(str(error), face.score, _shown(image))


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
