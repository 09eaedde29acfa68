"""From the content of a file to samples: the work of a build's processes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from PIL import Image, ImageOps

from trainer.data.build.clean import image_flaws, shape_flaw
from trainer.data.build.duplicates import signature
from trainer.data.build.faces import Face, FaceFinder, crop_face
from trainer.data.build.store import File, Rejected, Sample
from trainer.data.images import ImageError, decode_reduced, encode, pixel_digest, to_square

OPTIONAL_CHECKS = {
    "near-duplicate": "near-duplicate",
    "narrow": "too narrow",
    "dark": "too dark",
    "flat": "flat",
    "blurred": "blurred",
}
"""The checks that ``--keep`` can switch off: {its name on the command line: the kind of reason in rejected.csv}."""

_PREVIEW_SIZE = 128  # pixels, at most


@dataclass(frozen=True)
class Options:
    """How an image becomes a sample.

    Attributes:
        size: side of the samples, in pixels.
        crop: "center" or "none", see ``images.to_square``, or "face": the face of a cat.
        faces: with "face": "best" takes one face of each image, "all" takes each.
        min_size: the least number of pixels of the original's shorter side.
        keep: the checks that are switched off, of ``OPTIONAL_CHECKS``.
    """

    size: int
    crop: str
    min_size: int
    faces: str = "best"
    keep: tuple[str, ...] = ()


Results = list[Sample | Rejected]
"""What a file becomes, at least one: a sample, or the reason why there is none, for each image cut out of it."""


@dataclass(frozen=True)
class RawFile:
    """A file that was read: its label, if the data set has labels, and its content, or why it could not be read."""

    file: File
    label: str | None
    content: bytes | Rejected


@dataclass(frozen=True)
class PreparedFile:
    file: File
    label: str | None
    results: Results


def prepare_files(files: list[RawFile], options: Options) -> list[PreparedFile]:
    return [PreparedFile(raw.file, raw.label, prepare(raw.content, options)) for raw in files]


def prepare(content: bytes | Rejected, options: Options) -> Results:
    """Decode, check, crop, resize and encode the image in a file with this content."""
    if isinstance(content, Rejected):
        return [content]
    # Small faces need all pixels of the image, and so does the check whether it is square.
    reduced = options.size if options.crop == "center" else None
    try:
        decoded = decode_reduced(content, reduced)
    except ImageError as error:
        return [Rejected(str(error))]
    image, (width, height) = decoded.image, decoded.size
    shorter = min(width, height)
    if shorter < options.min_size:
        reason = f"too small: {width}x{height}, the shorter side needs {options.min_size}"
        return [Rejected(reason, shorter, _preview(image))]
    switched_off = {OPTIONAL_CHECKS[name] for name in options.keep}
    flaw = shape_flaw(width, height)
    if flaw is not None and flaw.kind not in switched_off:
        return [Rejected(str(flaw), flaw.score, _preview(image))]
    digest = pixel_digest(image)
    results: Results = []
    for number, square in enumerate(_squares(image, options)):
        if isinstance(square, Rejected):
            results.append(square)
            continue
        flaws = [flaw for flaw in image_flaws(square) if flaw.kind not in switched_off]
        if flaws:
            results.append(Rejected(str(flaws[0]), flaws[0].score, _preview(square)))
            continue
        # Two faces of one image are different samples, but the faces of its copies are duplicates.
        own_digest = digest if number == 0 else digest + b"%d" % number
        own_signature = b"" if "near-duplicate" in options.keep else signature(square)
        results.append(Sample(encode(square), own_digest, width, height, own_signature, decoded.ignores_profile))
    return results


def _squares(image: Image.Image, options: Options) -> list[Image.Image | Rejected]:
    """The squares to cut out of an image, or why there are none: at least one."""
    if options.crop == "face":
        faces = _face_finder().find(image)
        if not faces:
            return [Rejected("no face", None, _preview(image))]
        cropped = [_cropped(image, face, options) for face in faces]
        if options.faces == "all":
            return cropped
        return [next((square for square in cropped if isinstance(square, Image.Image)), cropped[0])]
    try:
        return [to_square(image, options.size, options.crop)]
    except ImageError as error:
        return [Rejected(str(error), None, _preview(image))]


def _cropped(image: Image.Image, face: Face, options: Options) -> Image.Image | Rejected:
    if face.side < options.min_size:
        reason = f"too small: a face of {face.side:.0f} pixels, {options.min_size} are needed"
        return Rejected(reason, face.side, _preview(image))
    try:
        return crop_face(image, face, options.size)
    except ImageError as error:
        return Rejected(str(error), face.score, _preview(image))


@functools.cache
def _face_finder() -> FaceFinder:
    """One for each process, because loading it takes long."""
    return FaceFinder()


def _preview(image: Image.Image) -> bytes:
    """The whole image, reduced, on a white square."""
    side = min(max(image.size), _PREVIEW_SIZE)
    return encode(ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, color="white"))
