from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest
from trainer.data.build import sources
from trainer.data.build.build import Report, build
from trainer.data.build.prepare import OPTIONAL_CHECKS
from trainer.data.build.verify import verify

SIZE = 16


def noise(seed: int, width: int = 20, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def run(*paths: Path | str, out: Path | str, **options: Any) -> tuple[Manifest, Report]:
    manifest, report = build(paths, out, **{"size": SIZE, "processes": 0, "keep": OPTIONAL_CHECKS, **options})
    assert manifest is not None
    return manifest, report


def rejected(out: Path) -> dict[str, str]:
    with (out / "rejected.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "reason", "score"]
    return {file: reason for file, reason, _ in rows}


def samples(manifest: Manifest, *splits: str) -> dict[str, Any]:
    """All samples by source, as stock webdataset reads them."""
    paths = [path for split in splits or ("train", "val") for path in manifest.paths(split)]
    return {s["json"]["source"]: s for s in webdataset.WebDataset(paths, shardshuffle=False).decode("pil")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images in a folder and its subfolder."""
    return write(tmp_path / "in" / "pics", {f"{'sub/' * (i % 2)}{i:02d}.png": packed(noise(i)) for i in range(40)})


def test_images_are_cropped_and_resized(tmp_path: Path) -> None:
    wide, exact = noise(0, 60, 30), noise(1, SIZE, SIZE)
    source = write(tmp_path / "pics", {"wide.png": packed(wide), "sub/exact.png": packed(exact)})
    manifest, report = run(source, out=tmp_path / "out", val_fraction=0.5)
    found = samples(verify(tmp_path / "out"))
    assert set(found) == {"pics/wide.png", "pics/sub/exact.png"}
    expected = wide.crop((15, 0, 45, 30)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    assert found["pics/wide.png"]["webp"].tobytes() == expected.tobytes()
    assert found["pics/sub/exact.png"]["webp"].tobytes() == exact.tobytes()
    assert found["pics/wide.png"]["json"] == {"source": "pics/wide.png", "width": 60, "height": 30}
    assert manifest.source == ("pics",)
    assert manifest.options == {
        "size": SIZE,
        "crop": "center",
        "min_size": 8,
        "keep": sorted(OPTIONAL_CHECKS),
        "val_fraction": 0.5,
    }
    assert not report.rejected
    assert rejected(tmp_path / "out") == {}


def test_rejected_files_are_listed_with_the_reason(tmp_path: Path) -> None:
    good = noise(0)
    jpeg = packed(noise(1, 64, 64), "JPEG", quality=95)
    files = {
        "a.png": packed(good),
        "b copy.bmp": packed(good, "BMP"),
        "c copy.png": packed(good),
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>",
        "small.png": packed(noise(2, 7, 30)),
        "just.png": packed(noise(3, 8, 30)),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "notes.txt": b"not listed",
    }
    manifest, report = run(write(tmp_path / "pics", files), out=tmp_path / "out")
    assert set(samples(manifest)) == {"pics/a.png", "pics/just.png"}
    reasons = rejected(tmp_path / "out")
    assert reasons.pop("pics/cut.jpg").startswith("not readable: ")
    assert reasons == {
        "pics/b copy.bmp": "duplicate: the same pixels as pics/a.png",
        "pics/c copy.png": "duplicate: the same pixels as pics/a.png",
        "pics/empty.jpg": "empty file",
        "pics/page.jpg": "not a picture",
        "pics/small.png": "too small: 7x30, the shorter side needs 8",
    }
    assert report.rejected == {
        "duplicate": 2,
        "empty file": 1,
        "not a picture": 1,
        "not readable": 1,
        "too small": 1,
    }
    assert report.enlarged == 1


def test_duplicates_are_found_across_sources_and_before_resizing(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.png": packed(noise(0))})
    # Equal after resizing to 16x16, but different originals: all three are kept.
    flat = {f"{side}.png": packed(Image.new("RGB", (side, side), "red")) for side in (20, 21, 22)}
    two = write(tmp_path / "two", {"again.png": packed(noise(0), compress_level=1), **flat})
    manifest, _ = run(one, two, out=tmp_path / "out")
    assert set(samples(manifest)) == {"one/a.png", "two/20.png", "two/21.png", "two/22.png"}
    assert rejected(tmp_path / "out") == {"two/again.png": "duplicate: the same pixels as one/a.png"}
    assert manifest.source == ("one", "two")


def test_image_with_exif_rotation_is_a_duplicate_of_the_upright_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = noise(0, 30, 20)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    source = write(tmp_path / "pics", {"a.png": packed(upright), "b.png": packed(stored, exif=exif)})
    run(source, out=tmp_path / "out")
    assert rejected(tmp_path / "out") == {"pics/b.png": "duplicate: the same pixels as pics/a.png"}


def test_min_size_can_be_set(tmp_path: Path) -> None:
    source = write(tmp_path / "pics", {f"{side}.png": packed(noise(side, side, side)) for side in (4, 15, 16, 40)})
    manifest, report = run(source, out=tmp_path / "out", min_size=16)
    assert set(samples(manifest)) == {"pics/16.png", "pics/40.png"}
    assert report.enlarged == 0
    manifest, report = run(source, out=tmp_path / "all", min_size=1)
    assert len(samples(manifest)) == 4
    assert report.enlarged == 2


def test_crop_none_rejects_images_that_are_not_square(tmp_path: Path) -> None:
    source = write(tmp_path / "pics", {"a.png": packed(noise(0, 20, 20)), "b.png": packed(noise(1, 20, 21))})
    manifest, _ = run(source, out=tmp_path / "out", crop="none")
    assert set(samples(manifest)) == {"pics/a.png"}
    assert rejected(tmp_path / "out")["pics/b.png"].startswith("not square: 20x21")


def test_same_input_and_seed_give_the_same_bytes_with_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"x")
    outs = [tmp_path / "here", tmp_path / "pool"]
    for out, processes in zip(outs, (0, 2), strict=True):
        run(folder, out=out, processes=processes)
    names = {path.name for path in outs[0].iterdir()}
    assert names == {path.name for path in outs[1].iterdir()}
    assert {"contact.png", "manifest.json", "rejected.csv", "train-000000.tar", "val-000000.tar"} <= names
    for name in names:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


def test_split_and_order_do_not_depend_on_the_kind_of_source(folder: Path, tmp_path: Path) -> None:
    files = sorted(path for path in folder.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "pics.zip", "w") as archive:
        for path in reversed(files):
            archive.write(path, path.name)
    with tarfile.open(tmp_path / "pics.tar.gz", "w:gz") as tar:
        tar.add(folder, "pics")
    sources = [folder, tmp_path / "pics.zip", tmp_path / "pics.tar.gz"]
    manifests = [run(source, out=tmp_path / f"out{i}")[0] for i, source in enumerate(sources)]
    orders = [[Path(name).name for name in samples(manifest)] for manifest in manifests]
    assert len(orders[0]) == 40
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != sorted(orders[0])
    validation = [{Path(name).name for name in samples(manifest, "val")} for manifest in manifests]
    assert len(validation[0]) == 4
    assert validation[0] == validation[1] == validation[2]
    other, _ = run(folder, out=tmp_path / "other", seed=1)
    assert {Path(name).name for name in samples(other, "val")} != validation[0]


def test_data_set_can_be_built_from_a_data_set(folder: Path, tmp_path: Path) -> None:
    first, _ = run(folder, out=tmp_path / "first")
    second, report = run(tmp_path / "first", out=tmp_path / "second")
    assert not report.rejected
    pixels = [{s["webp"].tobytes() for s in samples(manifest).values()} for manifest in (first, second)]
    assert len(pixels[0]) == 40
    assert pixels[0] == pixels[1]


def test_large_and_many_images_go_through_the_process_pool(tmp_path: Path) -> None:
    files = {f"{i}.png": packed(noise(i, 700, 700)) for i in range(4)}
    files |= {f"small{i}.png": packed(noise(i)) for i in range(70)}
    assert len(files["0.png"]) > 1 << 20, "a chunk of its own"
    manifest, _ = run(write(tmp_path / "pics", files), out=tmp_path / "out", processes=2)
    assert len(samples(manifest)) == 74


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no usable image in .*pics: there are no files of images"),
        ({"notes.txt": b"x"}, "no usable image in .*pics: there are no files of images"),
        ({"a.jpg": b"x", "b.jpg": b"y"}, r"2 not a picture, beginning with pics/a\.jpg \(not a picture\)"),
        ({"a.png": packed(noise(0, 4, 4))}, r"1 too small.*4x4, the shorter side needs 8"),
    ],
)
def test_no_usable_image_is_a_user_error_and_leaves_nothing(
    tmp_path: Path, files: dict[str, bytes], complaint: str
) -> None:
    (tmp_path / "pics").mkdir()
    write(tmp_path / "pics", files)
    with pytest.raises(UserError, match=complaint):
        run(tmp_path / "pics", out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["pics"]  # noqa: PTH208


def test_killed_worker_process_is_reported_and_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def members(source: sources.Source) -> Iterator[sources.Member]:
        for i in range(33):  # one chunk, which starts the worker process, and the first file of the next
            yield sources.Member(f"{i}.png", 0, Path(source.location).read_bytes)
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    path = write(tmp_path / "in", {"a.png": packed(noise(0))}) / "a.png"
    with monkeypatch.context() as patch:
        patch.setattr(sources.Source, "members", members)
        patch.setattr(sources.Source, "count", lambda self: None)
        with pytest.raises(UserError, match=r"a worker process was killed.*--processes 1.*the work so far is kept"):
            run(path, out=tmp_path / "out", processes=1)
    assert not (tmp_path / "out").exists()
    assert len(samples(run(path, out=tmp_path / "out")[0])) == 1


def test_missing_source_is_reported_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing at"):
        run(folder, tmp_path / "none", out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]  # noqa: PTH208


def test_out_inside_the_source(folder: Path) -> None:
    manifest, report = run(folder, out=folder / "out")
    assert len(samples(manifest)) == 40
    assert not report.rejected


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    source = tmp_path / "pics"
    source.mkdir()
    for name, data in ((b"caf\xe9.png", packed(noise(0))), (b"th\xe9.png", b"x"), (b'new\n"line.png', b"y")):
        (source / os.fsdecode(name)).write_bytes(data)
    run(source, out=tmp_path / "out")
    assert rejected(tmp_path / "out") == {"pics/th\\xe9.png": "not a picture", 'pics/new\\n"line.png': "not a picture"}
    verify(tmp_path / "out")


def test_report_counts_the_most_common_reason_first() -> None:
    report = Report()
    report.rejected.update({"too small": 1, "duplicate": 3})
    assert str(report) == "3 duplicate, 1 too small"


def test_manifest_is_plain_json_without_paths_of_this_machine(folder: Path, tmp_path: Path) -> None:
    run(folder, out=tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert record["splits"]["train"]["images"] == 36
    assert record["digest"] == Manifest.load(tmp_path / "out").digest
