"""How reliable is the face finder of `catdata build --crop face`, and what does its second opinion gain and cost?

Finds the faces in PHOTOS, crops the best one of each photo as `catdata build` does, and compares them with faces marked
by hand (--truth); photos without a mark show no cat. It runs with and without the second opinion, which is a classifier
of the crop.

  precision  crops that show a marked face, frontal or not, as a part of all crops
  recall     photos with a crop of a face marked as frontal, as a part of all photos that have one
  even, odd  the same for every second photo by name, the first one being even
  ratio      speed with the second opinion over speed without, on one core, without decoding the photos; 1 is free

A crop is right if its centre is less than half a face from the mark's and its face half to twice as wide.

examples:
  python benchmarks/faces.py photos.tar --truth benchmarks/faces_truth.csv
  python benchmarks/faces.py photos/ --truth benchmarks/faces_truth.csv --out sheets/
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from measure import machine, table
from PIL import Image, ImageDraw, ImageOps

from catgan.command import Parser, UserError, run_command, say
from trainer.data.build import sources
from trainer.data.build.faces import Face, FaceFinder, crop_face
from trainer.data.build.progress import progress
from trainer.data.images import ImageError, decode

SIZE = 128
COLUMNS = 12


@dataclass(frozen=True)
class Outcome:
    """The result for a photo."""

    photo: Image.Image
    crop: Image.Image | None
    """None: no face was found."""
    right: bool
    """The crop shows a marked face."""
    found: bool
    """The crop shows a face marked as frontal."""
    frontal: bool
    """The photo has a face marked as frontal."""


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("python benchmarks/faces.py", __doc__)
    parser.add_argument("photos", metavar="PHOTOS", help="folder, zip or tar")
    parser.add_argument("--truth", type=Path, required=True, metavar="CSV", help="file,frontal,x,y,width by hand")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write grids of crops and of missed photos here")
    a = parser.parse_args(argv)
    marks = _marks(a.truth)
    photos = sorted(_photos(a.photos), key=lambda photo: photo[0])
    if not photos:
        raise UserError(f"no photo in {a.photos}")
    ways = {"with": FaceFinder(), "without": FaceFinder(classifier=lambda crop: 1.0)}
    outcomes: dict[str, list[Outcome]] = {way: [] for way in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for finder in ways.values():
        finder.load()
    for name, photo in progress(photos, "find", "photo", len(photos)):
        for way, finder in ways.items():
            began = time.process_time()
            crop, face = _best(finder, photo)
            seconds[way] += time.process_time() - began
            outcomes[way].append(_outcome(photo, crop, face, marks.get(name, [])))
    if a.out:
        _sheets(a.out, outcomes["with"])
    ours = outcomes["with"]
    results = {
        "all": _rates(ours),
        "even": _rates(ours[::2]),
        "odd": _rates(ours[1::2]),
        "no second opinion": _rates(outcomes["without"]),
    }
    table(("photos", *results["all"]), [(what, *rates.values()) for what, rates in results.items()])
    return {
        **results["all"],
        "results": results,
        "photos_per_second": {way: round(len(photos) / seconds[way], 2) for way in ways},
        "ratio": round(seconds["without"] / seconds["with"], 3),
        "machine": machine(),
    }


def _marks(path: Path) -> dict[str, list[tuple[bool, float, float, float]]]:
    """The marks by file name: frontal, and x, y and width as parts of the photo. A row without x marks no face."""
    marks: dict[str, list[tuple[bool, float, float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["x"]:
                    mark = (row["frontal"] == "1", float(row["x"]), float(row["y"]), float(row["width"]))
                    marks.setdefault(row["file"], []).append(mark)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--truth {path} is not a table of file,frontal,x,y,width: {error}") from None
    return marks


def _photos(source: str) -> Iterator[tuple[str, Image.Image]]:
    for member in sources.identify(source).members():
        try:
            yield PurePosixPath(member.name).name, decode(member.read())
        except ImageError as error:
            say(f"skipped {member.name}: {error}")


def _best(finder: FaceFinder, photo: Image.Image) -> tuple[Image.Image | None, Face | None]:
    """The best face that can be cropped, as `catdata build` takes it."""
    for face in finder.find(photo):
        try:
            return crop_face(photo, face, SIZE), face
        except ImageError:
            continue
    return None, None


def _outcome(
    photo: Image.Image, crop: Image.Image | None, face: Face | None, marks: list[tuple[bool, float, float, float]]
) -> Outcome:
    fitting = [frontal for frontal, x, y, width in marks if face and _fits(face, photo, x, y, width)]
    return Outcome(photo, crop, bool(fitting), any(fitting), any(frontal for frontal, *_ in marks))


def _fits(face: Face, photo: Image.Image, x: float, y: float, width: float) -> bool:
    near = math.hypot(face.x - x * photo.width, face.y - y * photo.height) < width * photo.width / 2
    return near and 0.5 < face.side / (width * photo.width) < 2


def _rates(outcomes: list[Outcome]) -> dict[str, Any]:
    """Precision and recall; precision is 0 if there are no crops."""
    crops = sum(outcome.crop is not None for outcome in outcomes)
    frontal = sum(outcome.frontal for outcome in outcomes)
    return {
        "precision": round(sum(outcome.right for outcome in outcomes) / max(crops, 1), 4),
        "recall": round(sum(outcome.found for outcome in outcomes) / max(frontal, 1), 4),
        "n": len(outcomes),
        "crops": crops,
        "frontal": frontal,
    }


def _sheets(folder: Path, outcomes: list[Outcome]) -> None:
    """Write ``kept.png``, wrong crops in a red frame, and ``missed.png``, photos whose frontal face was not found."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [outcome for outcome in outcomes if outcome.crop]
    missed = [outcome.photo for outcome in outcomes if outcome.frontal and not outcome.found]
    _sheet([outcome.crop for outcome in kept if outcome.crop], [outcome.right for outcome in kept]).save(
        folder / "kept.png"
    )
    _sheet(missed, [True] * len(missed)).save(folder / "missed.png")


def _sheet(images: list[Image.Image], right: list[bool]) -> Image.Image:
    rows = max(1, -(-len(images) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE))
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = i % COLUMNS * SIZE, i // COLUMNS * SIZE
        sheet.paste(ImageOps.contain(image, (SIZE, SIZE)), (left, top))
        if not right[i]:
            draw.rectangle((left, top, left + SIZE - 1, top + SIZE - 1), outline="red", width=4)
    return sheet


if __name__ == "__main__":
    run_command("faces.py", main)
