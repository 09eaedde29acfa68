"""Rejected images: reasons, scores, previews, and labels that are missing."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.data.build import build as building
from trainer.data.build import duplicates, prepare
from trainer.data.build.build import Report, build
from trainer.data.build.prepare import OPTIONAL_CHECKS
from trainer.data.build.sheet import rejected_sheet
from trainer.data.build.verify import verify
from trainer.data.images import ImageError

SIZE = 16


def noise(seed: int, side: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def save(folder: Path, **images: Image.Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return folder


def run(source: Path, out: Path, **options: Any) -> tuple[Manifest, Report]:
    manifest, report = build([source], out, **{"size": SIZE, "processes": 0, **options})
    assert manifest is not None
    return manifest, report


def rows(out: Path) -> dict[str, tuple[str, str]]:
    """Reason and score by file."""
    with (out / "rejected.csv").open(newline="", encoding="utf-8") as file:
        return {row["file"]: (row["reason"], row["score"]) for row in csv.DictReader(file)}


def samples(manifest: Manifest) -> list[dict[str, Any]]:
    paths = [path for split in ("train", "val") for path in manifest.paths(split)]
    return list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))


@dataclass
class Flaw:
    kind: str
    score: float
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@pytest.fixture
def simple_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow is an aspect above 4, dark a mean below 20, flat a standard deviation below 5."""

    def shape(width: int, height: int) -> Flaw | None:
        aspect = max(width, height) / min(width, height)
        return Flaw("too narrow", aspect, f"{width}x{height}") if aspect > 4 else None

    def flaws(image: Image.Image) -> list[Flaw]:
        pixels = np.asarray(image, np.float32)
        found = [Flaw("too dark", float(pixels.mean()), "night")] if pixels.mean() < 20 else []
        return found + ([Flaw("flat", float(pixels.std()), "a wall")] if pixels.std() < 5 else [])

    monkeypatch.setattr(prepare, "shape_flaw", shape)
    monkeypatch.setattr(prepare, "image_flaws", flaws)


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    return save(
        tmp_path / "pics",
        good=noise(0),
        banner=noise(1).resize((100, 20)),
        night=Image.new("RGB", (20, 20), (3, 3, 3)),
        wall=Image.new("RGB", (20, 20), (180, 180, 180)),
        small=noise(2, 7),
    )


@pytest.mark.usefixtures("simple_checks")
def test_flaws_are_listed_with_their_scores(flawed: Path, tmp_path: Path) -> None:
    manifest, report = run(flawed, tmp_path / "out")
    assert rows(tmp_path / "out") == {
        "pics/banner.png": ("too narrow: 100x20", "5"),
        "pics/night.png": ("too dark: night", "3"),
        "pics/wall.png": ("flat: a wall", "0"),
        "pics/small.png": ("too small: 7x7, the shorter side needs 8", "7"),
    }
    assert report.read == 5
    assert report.kept == len(samples(manifest)) == 1


@pytest.mark.usefixtures("simple_checks")
@pytest.mark.parametrize(
    ("keep", "kept"),
    [([], 1), (["narrow"], 2), (["flat"], 2), (["dark"], 1), (["dark", "flat"], 3), (["narrow", "dark", "flat"], 4)],
)
def test_checks_can_be_switched_off_by_kind(flawed: Path, tmp_path: Path, keep: list[str], kept: int) -> None:
    manifest, report = run(flawed, tmp_path / "out", keep=keep)
    assert (report.kept, report.read) == (kept, 5)
    assert manifest.options.get("keep", []) == sorted(keep)


@pytest.fixture
def brightness_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near-duplicates have the same hash, the red of their first pixel; the largest is kept."""

    def near(hashes: Any, thumbnails: Any, pixels: Any, keys: Any) -> dict[int, tuple[int, int]]:
        assert hashes.dtype == np.uint64
        assert thumbnails.shape == (len(hashes), 3)
        assert thumbnails.dtype == np.uint8
        assert pixels.shape == keys.shape == hashes.shape
        found = {}
        for value in set(hashes.tolist()):
            same = sorted(np.flatnonzero(hashes == value).tolist(), key=lambda i: -pixels[i])
            found.update({i: (same[0], int(thumbnails[i, 0])) for i in same[1:]})
        return found

    monkeypatch.setattr(duplicates, "perceptual_hash", lambda image: image.getpixel((0, 0))[0] << 56)
    monkeypatch.setattr(duplicates, "thumbnail", lambda image: np.asarray(image)[0, 0])
    monkeypatch.setattr(building, "near_duplicates", near)


def plain(colour: int, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (colour, 0, 0))


@pytest.mark.usefixtures("brightness_duplicates")
def test_of_near_duplicates_the_largest_is_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "pics", a=plain(200, 20), b=plain(200, 40), c=plain(200, 30), d=plain(100, 20))
    manifest, report = run(source, tmp_path / "out", keep=["dark", "flat", "blurred"])
    assert rows(tmp_path / "out") == {
        "pics/a.png": ("near-duplicate: of pics/b.png", "200"),
        "pics/c.png": ("near-duplicate: of pics/b.png", "200"),
    }
    assert {sample["json"]["source"] for sample in samples(verify(tmp_path / "out"))} == {"pics/b.png", "pics/d.png"}
    assert (report.read, report.kept, report.rejected) == (4, 2, {"near-duplicate": 2})
    assert sum(split.images for split in manifest.splits.values()) == 2


@pytest.mark.usefixtures("brightness_duplicates")
def test_near_duplicates_can_be_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "pics", a=plain(200, 20), b=plain(200, 40))
    assert run(source, tmp_path / "out", keep=OPTIONAL_CHECKS)[1].kept == 2


@dataclass
class Box:
    left: int
    side: float = 40
    score: float = 3


class Finder:
    """A face for each white pixel in the first row, the rightmost best."""

    def find(self, image: Image.Image) -> list[Box]:
        return [Box(x) for x in reversed(range(image.width)) if image.getpixel((x, 0)) == (255, 255, 255)]


def crop(image: Image.Image, face: Box, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), (face.left, 0, 0))


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three images: with three faces, with none, and a copy of the first."""
    prepare._face_finder.cache_clear()
    monkeypatch.setattr(prepare, "FaceFinder", Finder)
    monkeypatch.setattr(prepare, "crop_face", crop)
    three = Image.new("RGB", (200, 50))
    for x in (30, 90, 150):
        three.putpixel((x, 0), (255, 255, 255))
    source = save(tmp_path / "pics", a=three, b=Image.new("RGB", (50, 50)), c=three)
    yield source
    prepare._face_finder.cache_clear()


def test_best_face_of_each_image(faces: Path, tmp_path: Path) -> None:
    manifest, report = run(faces, tmp_path / "out", crop="face", keep=OPTIONAL_CHECKS)
    (sample,) = samples(manifest)
    assert sample["webp"].getpixel((0, 0)) == (150, 0, 0)
    assert sample["json"] == {"source": "pics/a.png", "width": 200, "height": 50}
    assert (report.read, report.rejected) == (3, {"no face": 1, "duplicate": 1})
    assert manifest.options["faces"] == "best"


def test_small_faces_and_those_at_the_edge_are_rejected_one_by_one(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(self: Finder, image: Image.Image) -> list[Box]:
        return [Box(150), Box(90, side=7), Box(30)] if image.width == 200 else []

    def crop_unless_left(image: Image.Image, face: Box, size: int) -> Image.Image:
        if face.left == 30:
            raise ImageError("face at the edge: no room")
        return crop(image, face, size)

    monkeypatch.setattr(Finder, "find", find)
    monkeypatch.setattr(prepare, "crop_face", crop_unless_left)
    (faces / "c.png").unlink()
    _, report = run(faces, tmp_path / "out", crop="face", faces="all", keep=OPTIONAL_CHECKS)
    assert (report.read, report.kept) == (4, 1)
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == [
            "too small: a face of 7 pixels, 8 are needed",
            "face at the edge: no room",
            "no face",
        ]


def test_all_faces_are_counted(faces: Path, tmp_path: Path) -> None:
    manifest, report = run(faces, tmp_path / "out", crop="face", faces="all", keep=OPTIONAL_CHECKS)
    assert {sample["webp"].getpixel((0, 0))[0] for sample in samples(manifest)} == {30, 90, 150}
    assert (report.read, report.kept, report.rejected) == (7, 3, {"no face": 1, "duplicate": 3})
    again = run(faces, tmp_path / "again", crop="face", faces="all", keep=OPTIONAL_CHECKS)[0]
    assert again.digest == manifest.digest


def test_rejected_sheet_is_shared_evenly_by_the_kinds(tmp_path: Path) -> None:
    colours = {"dark": "#000", "flat": "#888", "narrow": "#00f"}
    packed = {}
    for kind, colour in colours.items():
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "WEBP", lossless=True)
        packed[kind] = [buffer.getvalue()] * (2 if kind == "narrow" else 100)
    sheet = rejected_sheet(packed)
    assert sheet.size == (8 * 128, 8 * 144)
    middles = [sheet.getpixel((x * 128 + 64, y * 144 + 64)) for y in range(8) for x in range(8)]
    assert Counter(middles) == {(0, 0, 0): 31, (136, 136, 136): 31, (0, 0, 255): 2}
    assert len(np.unique(np.asarray(sheet)[130:144, :128])) > 1, "the kind is written below"


@pytest.mark.usefixtures("simple_checks")
def test_sheets_of_kept_and_of_rejected_images(flawed: Path, tmp_path: Path) -> None:
    run(flawed, tmp_path / "out")
    with (
        Image.open(tmp_path / "out" / "contact.png") as contact,
        Image.open(tmp_path / "out" / "rejected.png") as sheet,
    ):
        assert contact.size == (SIZE, SIZE)
        assert sheet.size == (256, 288), "four kinds"


def test_no_rejected_sheet_without_previews(tmp_path: Path) -> None:
    source = save(tmp_path / "pics", good=noise(0))
    (source / "text.jpg").write_text("meow")
    run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "rejected.png").exists()


def test_number_of_previews_is_bounded(tmp_path: Path) -> None:
    from trainer.data.build.store import MAX_PREVIEWS, STORE_FILE, File, Rejected, Store

    with Store(tmp_path, 0) as store:
        for i in range(1000):
            store.add(File(i, str(i), 1, ""), [Rejected(f"{'even' if i % 2 else 'odd'}: {i}", i, bytes(5000))])
        assert len(store.previews("even", 1000)) == len(store.previews("odd", 1000)) == MAX_PREVIEWS
        assert store.num_rejected() == {"even": 500, "odd": 500}
    with Store(tmp_path, 0) as store:
        store.clear()
    assert (tmp_path / STORE_FILE).stat().st_size < 200_000


def breeds(folder: Path) -> Path:
    for i, name in enumerate(("tabby/a", "tabby/b", "siamese/a", "deep/siamese/c")):
        save((folder / name).parent, **{Path(name).name: noise(i)})
    return save(folder, loose=noise(9))


def labelled(manifest: Manifest) -> dict[str, str]:
    return {sample["json"]["source"]: manifest.labels[sample["json"]["label"]] for sample in samples(manifest)}


def test_labels_from_folders(tmp_path: Path) -> None:
    manifest, _ = run(breeds(tmp_path / "cats"), tmp_path / "out", labels="folder")
    assert manifest.labels == ("cats", "siamese", "tabby")
    assert labelled(verify(tmp_path / "out")) == {
        "cats/loose.png": "cats",
        "cats/tabby/a.png": "tabby",
        "cats/tabby/b.png": "tabby",
        "cats/siamese/a.png": "siamese",
        "cats/deep/siamese/c.png": "siamese",
    }


def test_archive_gives_no_label(tmp_path: Path) -> None:
    import shutil

    packed = shutil.make_archive(str(tmp_path / "cats"), "zip", breeds(tmp_path / "cats"))
    manifest, report = run(Path(packed), tmp_path / "out", labels="folder")
    assert manifest.labels == ("siamese", "tabby")
    assert rows(tmp_path / "out") == {"cats.zip/loose.png": ("no label", "")}
    assert report.read == 5


def test_labels_from_a_table_by_name_or_its_end(tmp_path: Path) -> None:
    table = tmp_path / "breeds.csv"
    lines = ["file,label", "cats/tabby/a.png,Tiger", "b.png,Tiger", "a.png,other", "deep/siamese/c.png,Élan"]
    table.write_text("\n".join(lines), encoding="utf-8")
    manifest, _ = run(breeds(tmp_path / "cats"), tmp_path / "out", labels=table)
    assert manifest.labels == ("Tiger", "other", "Élan")
    assert labelled(verify(tmp_path / "out")) == {
        "cats/tabby/a.png": "Tiger",
        "cats/tabby/b.png": "Tiger",
        "cats/siamese/a.png": "other",
        "cats/deep/siamese/c.png": "Élan",
    }
    assert rows(tmp_path / "out") == {"cats/loose.png": ("no label", "")}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begins with '': the first line has to be file,label"),
        ("name,class\na,b\n", "begins with 'name,class'"),
        ("file,label\na.png,x\na.png,y\n", "line 3: a.png is listed twice"),
        ("file,label\na.png\n", "line 2: give a file and a label, not 'a.png'"),
        ("file,label\na.png,\n", "line 2: give a file and a label"),
        ("file,label\nno.png,x\n", "no usable image in .*: 5 no label"),
    ],
)
def test_mistakes_in_tables_are_reported(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "breeds.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        run(breeds(tmp_path / "cats"), tmp_path / "out", labels=tmp_path / "breeds.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["breeds.csv", "cats"]


def test_data_set_without_labels_has_none(tmp_path: Path) -> None:
    manifest, _ = run(save(tmp_path / "pics", a=noise(0)), tmp_path / "out")
    assert manifest.labels == ()
    assert "label" not in (tmp_path / "out" / "manifest.json").read_text()
