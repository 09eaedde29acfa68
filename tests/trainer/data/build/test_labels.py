"""Labels from tables and folders as people and other systems write them."""

from __future__ import annotations

import csv
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest
from tests.trainer.data.build.test_resume import Stop, stop_after
from trainer.data.build.build import Report, build
from trainer.data.build.labels import Labels
from trainer.data.build.names import class_name, comparable

ROWS = "file,label\n0.png,cat\nsub/1.png,dog\nkätzchen.png,kitten\n"
NAMES = ["pics/0.png", "pics/sub/1.png", "pics/" + unicodedata.normalize("NFD", "kätzchen.png")]


def table(tmp_path: Path, text: str | bytes) -> Labels:
    (tmp_path / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return Labels(tmp_path / "labels.csv")


def found(labels: Labels, *names: str, kind: str = "folder") -> list[str | None]:
    return [labels.of(name, kind) for name in names]


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.encode("utf-8-sig"),
        ROWS.encode("utf-16"),
        ROWS.encode("utf-16-le"),
        ROWS.encode("utf-16-be"),
        ROWS.encode("cp1252"),
        ROWS.replace("\n", "\r\n"),
        ROWS.replace("\n", "\r"),
        ROWS.replace(",", ";"),
        ROWS.replace(",", "\t").encode("utf-16"),
        ROWS.replace(",", " , "),
        ROWS.replace("file,label", "File,LABEL"),
        "\n\n" + ROWS.replace("\n", ",,\n") + ",\n\n",
        "file,label\n" + "".join(f'"{row.replace(",", chr(34) + ", " + chr(34))}"\n' for row in ROWS.split("\n")[1:-1]),
        ROWS.replace("sub/", "pics\\sub\\"),
        ROWS.replace("sub/", "./sub//"),
        ROWS.replace("0.png", "C:\\Users\\me\\pics\\0.png"),
        ROWS.replace("0.png", "/home/me/pics/0.png"),
        ROWS.replace("0.png", "s3://bucket/pics/0.png"),
        ROWS.replace(".png", ".PNG"),
        unicodedata.normalize("NFD", ROWS),
    ],
    ids=str,
)
def test_tables_of_other_systems(tmp_path: Path, text: str | bytes, capfd: pytest.CaptureFixture[str]) -> None:
    labels = table(tmp_path, text)
    assert found(labels, *NAMES) == ["cat", "dog", "kitten"]
    assert list(labels.remarks()) == []
    assert labels.identity
    if text == ROWS.encode("cp1252"):
        assert "labels.csv is not UTF-8: read as Windows-1252" in capfd.readouterr().err


def test_names_on_disk_in_latin_1(tmp_path: Path) -> None:
    name = os.fsdecode("pics/kätzchen.png".encode("latin-1"))
    assert found(table(tmp_path, ROWS), name) == found(table(tmp_path, ROWS.encode("latin-1")), name) == ["kitten"]
    assert Labels("folder").of(os.fsdecode("pics/kätzchen/0.png".encode("latin-1")), "folder") == "kätzchen"


def test_rows_may_name_files_as_rejected_csv_does(tmp_path: Path) -> None:
    assert found(table(tmp_path, "file,label\npics/Icon\\r,icon\n"), "pics/Icon\r") == ["icon"]


def test_paths_of_the_machine_on_which_an_archive_was_made(tmp_path: Path) -> None:
    labels = table(tmp_path, "file,label\nD:\\set\\cat\\0.png,cat\n/other/dog/0.png,dog\n")
    assert found(labels, "my.zip/cat/0.png", "my.zip/dog/0.png", "my.zip/0.png", kind="zip") == ["cat", "dog", None]


def test_the_longest_row_wins_and_case_decides_only_if_nothing_else_does(tmp_path: Path) -> None:
    labels = table(
        tmp_path, "file,label\n0.png,any\na/0.png,a\nA/0.png,A\nB/1.png,one\nb/1.png,two\n/x/2.png,x\n/y/2.png,y\n"
    )
    names = ["p/a/0.png", "p/A/0.png", "p/c/0.png", "p/c/0.PNG", "p/B/1.png", "p/B/1.PNG", "2.png"]
    assert found(labels, *names) == ["a", "A", "any", "any", "one", None, None], "no guess between different labels"


def test_rows_that_match_no_file_are_counted_and_named(tmp_path: Path) -> None:
    labels = table(tmp_path, "file,label\n0.jpg,cat\n1.png,cat\n2.jpg,cat\n3.jpg,cat\n4.jpg,cat\n")
    assert found(labels, "pics/0.png", "pics/1.png") == [None, "cat"]
    assert list(labels.remarks()) == ["labels: 4 of 5 rows match no file: '0.jpg', '2.jpg', '3.jpg' and 1 more"]


@pytest.mark.parametrize(
    "written",
    ["tabby", " tabby", "tabby ", "tabby\u00a0", "tab\u200bby", "\ufefftabby", "tabby\u2003", "\u200ftabby"],
)
def test_blanks_and_invisible_characters_make_no_class_of_their_own(tmp_path: Path, written: str) -> None:
    labels = table(tmp_path, f"file,label\n0.png,tabby\n1.png,{written}\n")
    assert found(labels, "0.png", "1.png") == ["tabby", "tabby"]
    labels = Labels("folder")
    assert found(labels, "pics/tabby/0.png", f"pics/{written}/1.png") == ["tabby", "tabby"]
    if written != "tabby":
        (remark,) = labels.remarks()
        assert "differ only in blanks or invisible characters and are one class" in remark


def test_names_of_classes_keep_their_letters() -> None:
    assert class_name("  Maine \t Coon ") == "Maine Coon"
    assert class_name("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"
    assert class_name(unicodedata.normalize("NFD", "Élan")) == "Élan"
    assert class_name(" \u200b") == ""
    assert comparable("a / b.png ") == "a/b.png"


def test_classes_that_are_probably_one_are_named() -> None:
    labels = Labels("folder")
    found(labels, *(f"pics/{name}/0.png" for name in ("tabby", "Tabby", "maine_coon", "Maine Coon", "siamese")))
    assert list(labels.remarks()) == [
        "labels: 'Maine Coon', 'maine_coon' differ only in case, blanks, - or _, and are 2 classes",
        "labels: 'Tabby', 'tabby' differ only in case, blanks, - or _, and are 2 classes",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("file,label\na.png,x\n./A\\..\\a.png,y\n", r"line 3: \./A\\\.\.\\a\.png is listed twice, first in line 2"),
        (unicodedata.normalize("NFD", "file,label\nä.png,x\n") + "ä.png,x\n", "is listed twice"),
        ("file,label\na.png, \u200b\n", "line 2: give a file and a label"),
        ('file,label\na.png,"cat\nb.png,dog\n', "a label with a line break, is a quotation mark missing before"),
        (
            b"PK\3\4\0\0" + bytes(range(256)) * 20,
            r"begins with 'PK\\\\x03\\\\x04.*: the first line has to be file,label",
        ),
        ("file,label\n".encode("utf-16") + b"\0", "cannot read .*utf-16"),
    ],
)
def test_mistakes_in_tables_are_reported(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        table(tmp_path, text)
    assert len(str(caught.value)) < 400


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def run(tmp_path: Path, labels: str | Path) -> tuple[Manifest, Report]:
    manifest, report = build([tmp_path / "pics"], tmp_path / "out", size=16, processes=0, labels=labels)
    assert manifest is not None
    return manifest, report


def reasons(tmp_path: Path) -> dict[str, str]:
    """Why each file was rejected."""
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def test_folders_of_several_systems_give_the_classes_that_a_reader_sees(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("Über", unicodedata.normalize("NFD", "Über"), "tabby", "tabby ", "Tabby")):
        save(tmp_path / "pics" / name / f"{i}.png", i)
    assert run(tmp_path, "folder")[0].labels == ("Tabby", "tabby", "Über")
    err = capfd.readouterr().err
    assert "labels: 'tabby', 'tabby ' differ only in blanks or invisible characters and are one class" in err
    assert "labels: 'Tabby', 'tabby' differ only in case, blanks, - or _, and are 2 classes" in err


def test_remarks_cover_files_that_an_earlier_process_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):
        save(tmp_path / "pics" / f"{i}.png", i)
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,cat\n" for i in (*range(6), 99)))
    with monkeypatch.context() as patch:
        stop_after(patch, 4, Stop())
        with pytest.raises(Stop):
            run(tmp_path, tmp_path / "labels.csv")
    assert "rows match" not in capfd.readouterr().err
    assert run(tmp_path, tmp_path / "labels.csv")[1].resumed == 4
    assert "labels: 1 of 7 rows match no file: '99.png'" in capfd.readouterr().err


def test_near_duplicates_with_another_label_are_counted_and_explained(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)).resize((128, 128))
    for name in ("tabby", "black"):
        (tmp_path / "pics" / name).mkdir(parents=True)
    image.save(tmp_path / "pics" / "tabby" / "0.png")
    image.resize((64, 64)).save(tmp_path / "pics" / "black" / "0.jpg", quality=90)  # the smaller one is rejected
    image.resize((64, 64)).save(tmp_path / "pics" / "tabby" / "1.jpg", quality=80)
    report = run(tmp_path, "folder")[1]
    assert (report.rejected, report.relabelled) == ({"near-duplicate": 2}, 1)
    assert reasons(tmp_path) == {
        "pics/black/0.jpg": "near-duplicate: of pics/tabby/0.png, whose label is tabby, not black",
        "pics/tabby/1.jpg": "near-duplicate: of pics/tabby/0.png",
    }


def test_copies_with_another_label_are_counted_and_explained(tmp_path: Path) -> None:
    save(tmp_path / "pics" / "all" / "0.png", 0)
    save(tmp_path / "pics" / "cat" / "0.png", 0)
    save(tmp_path / "pics" / "cat" / "1.png", 1)
    save(tmp_path / "pics" / "cat" / "1 copy.png", 1)
    report = run(tmp_path, "folder")[1]
    assert (report.rejected, report.relabelled) == ({"duplicate": 2}, 1)
    assert reasons(tmp_path) == {
        "pics/cat/0.png": "duplicate: the same pixels as pics/all/0.png, whose label is all, not cat",
        "pics/cat/1.png": "duplicate: the same pixels as pics/cat/1 copy.png",
    }
