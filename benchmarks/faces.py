"""Finding cats' faces: how many of the crops are faces, how many of the faces are found, and how fast."""

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

NAME = "faces.py"
SIZE = 128
COLUMNS = 12

_DESCRIPTION = """\
Find the faces in PHOTOS, crop the best one of each photo as `catdata build` would, and compare with faces marked by
hand. Photos that --truth does not name show no cat.

  precision  crops that show a face marked by hand (or a marked one that is not frontal), of all crops
  recall     photos with a crop of a face marked as frontal, of all photos with one
  even, odd  the same for every second photo by name, the first one being even

A crop counts if its middle is less than half a face from the mark's and the face's size within half to twice its.
Speed is of one process on one core, without decoding; `ratio` is the time without the second opinion over the time
with it.

examples:
  python benchmarks/faces.py photos.tar --truth benchmarks/faces_truth.csv
  python benchmarks/faces.py photos/ --truth benchmarks/faces_truth.csv --out sheets/
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a photo. ``crop`` is None where there is none; ``right``: it shows a face that is marked."""

    photo: Image.Image
    crop: Image.Image | None
    right: bool
    found: bool
    frontal: bool


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser(f"python benchmarks/{NAME}", _DESCRIPTION)
    parser.add_argument("photos", metavar="PHOTOS", help="folder, zip or tar")
    parser.add_argument("--truth", type=Path, required=True, metavar="CSV", help="file,frontal,x,y,width by hand")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write sheets of crops and of missed photos here")
    a = parser.parse_args(argv)
    marks = _marks(a.truth)
    photos = sorted(_photos(a.photos), key=lambda photo: photo[0])
    if not photos:
        raise UserError(f"no photo in {a.photos}")
    ways = {"with": FaceFinder(), "without": FaceFinder(opinion=lambda crop: 1.0)}
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
    """The rows of each file: frontal, and x, y and width as parts of the photo; a row without a face has no x."""
    marks: dict[str, list[tuple[bool, float, float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["x"]:
                    mark = (row["frontal"] == "1", float(row["x"]), float(row["y"]), float(row["width"]))
                    marks.setdefault(row["file"], []).append(mark)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--truth {path} is no table of file,frontal,x,y,width: {error}") from None
    return marks


def _photos(source: str) -> Iterator[tuple[str, Image.Image]]:
    for member in sources.check(source).members():
        try:
            yield PurePosixPath(member.name).name, decode(member.read())
        except ImageError as error:
            say(f"left out: {member.name}: {error}")


def _best(finder: FaceFinder, photo: Image.Image) -> tuple[Image.Image | None, Face | None]:
    """The best face that can be cropped, as the building of a data set takes it."""
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
    """Of no crops at all the precision is 0."""
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
    """``kept.png``, crops that are not right within a red frame, and ``missed.png``, photos without their face."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [outcome for outcome in outcomes if outcome.crop]
    missed = [outcome.photo for outcome in outcomes if outcome.frontal and not outcome.found]
    _sheet([outcome.crop for outcome in kept if outcome.crop], [outcome.right for outcome in kept]).save(
        folder / "kept.png"
    )
    _sheet(missed, [True] * len(missed)).save(folder / "missed.png")


def _sheet(pictures: list[Image.Image], right: list[bool]) -> Image.Image:
    rows = max(1, -(-len(pictures) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = i % COLUMNS * SIZE, i // COLUMNS * SIZE
        sheet.paste(ImageOps.contain(picture, (SIZE, SIZE)), (left, top))
        if not right[i]:
            draw.rectangle((left, top, left + SIZE - 1, top + SIZE - 1), outline="red", width=4)
    return sheet


def entry() -> None:
    run_command(NAME, main)


if __name__ == "__main__":
    entry()
