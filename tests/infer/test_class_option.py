"""``catinfer --class``: sheets, files, shards, walks, and where they come from."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest
from infer import bulk
from infer.classes import MAX_CLASSES, MAX_NAME
from infer.cli import main
from infer.containers import DamagedError
from infer.grid import grid, margin
from infer.latents import latents, walk
from infer.origin import read_packet
from infer.provenance import MAX_CLASSES_TEXT, Provenance
from infer.session import Generator
from infer.walk import STEPS
from tests.infer.conditional import NAMES, OFFSETS, expected, write
from tests.infer.conftest import SIZE, Z_DIM


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """A generator with the classes black, tabby and white."""
    return write(tmp_path)


def run(onnx: Path, *args: str | Path | int) -> dict[str, Any]:
    return main(["--onnx", str(onnx), "--device", "cpu", *map(str, args)])


def test_a_sheet_has_a_row_for_each_class(
    cats: Path, onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(cats, "--n", 4, "--out", tmp_path / "a.png")
    assert result["n"] == 4
    assert capsys.readouterr().err == "3 classes, which --class chooses: black, tabby, white\n"
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    beside = margin(SIZE, NAMES)
    assert sheet.shape == (3 * SIZE, beside + 4 * SIZE, 3)
    for row in range(3):
        images = np.concatenate(list(expected(onnx_file, range(4), row)), axis=1)
        np.testing.assert_array_equal(sheet[SIZE * row : SIZE * (row + 1), beside:], images)
        assert sheet[SIZE * row : SIZE * (row + 1), :beside].min() < 128  # its name
    run(cats, "--n", 4, "--class", "all", "--out", tmp_path / "b.png")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_sheet_of_one_class_is_a_square(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    run(cats, "--class", "white", "--n", 4, "--psi", "0.5", "--out", tmp_path / "a.png")
    images = expected(onnx_file, range(4), 2, psi=0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(grid(images)))


def test_seeds_below_rows_of_classes(cats: Path, tmp_path: Path) -> None:
    run(cats, "--seeds", "3,12345678", "--class", "white,black", "--labels", "--out", tmp_path / "a.png")
    images = Generator(cats, "cpu")(latents([3, 12345678] * 2, Z_DIM), label=np.array([2, 2, 0, 0]))
    rows = grid(images, 2, ["3", "12345678"] * 2, ["white", "black"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(rows))


def test_single_files_take_turns(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    """What a file shows depends on its seed and its class alone."""
    run(cats, "--seed", 3, "--n", 4, "--out", tmp_path / "all")
    names = ["cat-000003-black.png", "cat-000004-tabby.png", "cat-000005-white.png", "cat-000006-black.png"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    for seed, name in zip(range(3, 7), names, strict=True):
        image = np.asarray(Image.open(tmp_path / "all" / name))
        np.testing.assert_array_equal(image, expected(onnx_file, [seed], seed % 3)[0])
    run(cats, "--seed", 4, "--n", 1, "--class", "tabby", "--out", tmp_path / "one")
    (one,) = (tmp_path / "one").iterdir()
    assert one.name == "cat-000004.png"
    assert one.read_bytes() == (tmp_path / "all" / names[1]).read_bytes()


def test_names_of_files_hold_no_more_than_letters(tmp_path: Path) -> None:
    names = ["../../etc, passwd", "\N{CAT FACE}" * MAX_NAME, "x" * MAX_NAME, "ä b"]
    path = write(tmp_path, names)
    run(path, "--n", 4, "--out", tmp_path / "out")
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert found == [
        "cat-000000--etc-passwd.png",
        "cat-000001--.png",
        f"cat-000002-{'x' * 40}.png",
        "cat-000003-ä-b.png",
    ]


def test_an_array_takes_turns(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    run(cats, "--n", 100, "--class", "2,0", "--out", tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected(onnx_file, range(100), [2, 0] * 50))


def test_a_walk_stays_in_one_class(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    run(cats, "--n", 5, "--class", "white", "--interpolate", tmp_path / "a.webp")
    path = walk(latents(range(5), Z_DIM), STEPS)
    with Image.open(tmp_path / "a.webp") as film:
        for frame in (0, 7, 90):  # the last one in the second chunk of latents
            film.seek(frame)
            own = Generator(onnx_file, "cpu")(path[frame : frame + 1] + OFFSETS[2])[0]
            np.testing.assert_array_equal(np.asarray(film.convert("RGB")), own)


def test_a_sweep_of_one_class(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    run(cats, "--n", 3, "--class", "1", "--truncation-sweep", "0.5,1", "--out", tmp_path / "a.png")
    images = np.concatenate([expected(onnx_file, range(3), 1, psi) for psi in (0.5, 1)])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(grid(images, 3)))


def test_latents_in_classes(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    files = []
    for seed in (4, 9):
        np.savez(tmp_path / f"{seed}.npz", z=latents([seed], Z_DIM))
        files += ["--latent", tmp_path / f"{seed}.npz"]
    run(cats, *files, "--class", "white", "--out", tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected(onnx_file, [4, 9], 2))
    run(cats, *files, "--out", tmp_path / "a.png")
    images = expected(onnx_file, [4, 9] * 3, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(grid(images, 2, (), NAMES)))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--interpolate", "a.gif"], "--interpolate"),
        (["--interpolate", "a.gif", "--class", "1,2"], "--interpolate"),
        (["--truncation-sweep", "--out", "a.png"], "--truncation-sweep"),
        (["--latent", "a.npz", "--out", "a.npy"], "--latent with one array"),
    ],
)
def test_what_shows_one_class(
    cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", z=latents([4], Z_DIM))
    with pytest.raises(UserError, match=f"^{what} shows one class: give one as --class NAME, of black, tabby, white$"):
        run(cats, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "cats.onnx"]


def test_too_many_rows_for_a_sheet(tmp_path: Path) -> None:
    path = write(tmp_path, list(map(str, range(1000))), metadata=None)
    with pytest.raises(UserError, match=r"--n 3000: .* pixels, more than 16383 a side; use at most --n 2047"):
        run(path, "--class", "1", "--n", 3000, "--truncation-sweep", "1", "--out", tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--n 2047: .* pixels, more than 16383 a side; use at most --n 20\d\d, or"):
        run(path, "--class", "1,2", "--n", 2047, "--out", tmp_path / "a.png")


def test_one_class_alone_needs_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, ["cat"])
    run(path, "--n", 2, "--interpolate", tmp_path / "a.gif")
    run(path, "--n", 2, "--out", tmp_path / "out")
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["cat-000000.png", "cat-000001.png"]


# Many images


def test_shards_are_a_labelled_data_set(cats: Path, onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(cats, "--n", 5, "--class", "white,black", "--shards", "--out", f"{out}/")
    manifest = Manifest.load(str(out))
    assert manifest.labels == NAMES
    assert manifest.options["classes"] == ["white", "black"]
    assert manifest.is_labelled
    assert manifest.splits["train"].class_counts == (2, 0, 3)
    with tarfile.open(out / "train-000000.tar") as tar:
        records = [json.loads(tar.extractfile(f"{i:08d}.json").read()) for i in range(5)]  # type: ignore[union-attr]
        numbers = [int(tar.extractfile(f"{i:08d}.cls").read()) for i in range(5)]  # type: ignore[union-attr]
        image = Image.open(io.BytesIO(tar.extractfile("00000003.png").read()))  # type: ignore[union-attr]
    assert [record["label"] for record in records] == numbers == [2, 0, 2, 0, 2]
    np.testing.assert_array_equal(np.asarray(image), expected(onnx_file, [3], 0)[0])
    contact = np.asarray(grid(expected(onnx_file, range(5), [2, 0, 2, 0, 2])))
    np.testing.assert_array_equal(np.asarray(Image.open(out / "contact.png")), contact)
    (record,) = main(["inspect", str(out / "contact.png")])["files"]
    assert record["command"] is None  # no sheet looks so
    assert record["classes"] == ["white", "black"]


def test_work_continues_with_the_same_classes_alone(
    cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    monkeypatch.setattr(bulk, "PART", 2)
    save = bulk.Progress.save

    def stop(progress: bulk.Progress) -> None:
        save(progress)
        if progress.done == 4:
            raise Stopped

    files = ("--seed", 1, "--n", 7)
    with monkeypatch.context() as patched:
        patched.setattr(bulk.Progress, "save", stop)
        with pytest.raises(Stopped):
            run(cats, *files, "--class", "black,white", "--out", tmp_path / "out")
    for other in ([], ["--class", "black"], ["--class", "white,black"]):
        with pytest.raises(UserError, match="unfinished work of another command"):
            run(cats, *files, *other, "--out", tmp_path / "out")
    run(cats, *files, "--class", "0", "--class", "2", "--out", tmp_path / "out")
    run(cats, *files, "--class", "black,white", "--out", tmp_path / "at-once")
    ours, theirs = (sorted(path.iterdir()) for path in (tmp_path / "out", tmp_path / "at-once"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert len(ours) == 7


def test_jobs_without_classes_are_those_of_earlier_versions() -> None:
    assert "classes" not in bulk.Job("0", [1], 1.0, ".png", "CPU", False).settings()


# Where files come from


@pytest.mark.parametrize(
    "options",
    [
        "--n 3 --out a.png",
        "--n 3 --class tabby --out a.webp",
        "--seeds 3,9 --class=-odd --labels --out a.jpg",
        "--n 2 --class 'one, two' --class tabby --out a.png",
        "--n 2 --class 3 --interpolate a.gif",
        "--n 2 --class 1 --truncation-sweep 0.5,1 --out a.png",
    ],
)
def test_the_printed_command_makes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, ["1", "tabby", "-odd", "one, two", "it's \"<&>"])
    run(path, *shlex.split(options))
    (made,) = (path for path in tmp_path.iterdir() if path.stem == "a")
    (record, _) = main(["inspect", str(made), str(path)])["files"]
    assert record["class_count"] == len(record["classes"])
    main(shlex.split(record["command"])[1:])
    assert made.with_stem("again").read_bytes() == made.read_bytes()


def test_the_printed_command_of_single_files(cats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(cats, "--n", 3, "--out", "out/")
    for made, name in zip(sorted(Path("out").iterdir()), NAMES, strict=True):
        (record, _) = main(["inspect", str(made), str(cats)])["files"]
        assert record["classes"] == [name]
        assert f" --class={name} " in record["command"]
        main(shlex.split(record["command"])[1:])
        assert Path("again", f"cat-{record['seeds']:>06}.png").read_bytes() == made.read_bytes()


def test_a_blend_names_its_class(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from infer.files import encode

    packet = Provenance("blend", "0" * 64, (3, 4), (0.5,), mix=25, classes=["a&b c"]).packet()
    (tmp_path / "a.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), ".png", packet))
    main(["inspect", str(tmp_path / "a.png")])
    assert capsys.readouterr().err.endswith("#left=3&right=4&mix=25&psi=0.5&class=a%26b%20c\n")


def test_more_names_than_a_packet_holds_are_counted(cats: Path) -> None:
    names = ['"' * MAX_NAME + f"{i}" for i in range(MAX_CLASSES)]
    origin = Provenance("sheet", "0" * 64, range(0, 20_000, 2), (1.0,), classes=names)
    record = read_packet(origin.packet())  # asserts its size
    assert (record["class_count"], "classes" in record) == (MAX_CLASSES, False)
    fits = ["x" * (MAX_NAME - 4) + f"{i:04d}" for i in range(MAX_CLASSES_TEXT // (MAX_NAME + 20))]
    assert read_packet(Provenance("sheet", classes=fits).packet())["classes"] == fits


@pytest.mark.parametrize("text", ["tabby", "[]", "[1]", "[&quot;&#10;&quot;]", "[" * 9000, "[" * 9001])
def test_impossible_classes_in_metadata_are_damage(text: str) -> None:
    packet = Provenance("image", "0" * 64, (1,), (1.0,), classes=["tabby"]).packet()
    changed = packet.replace(b"[&quot;tabby&quot;]", text.encode())
    assert changed != packet
    with pytest.raises(DamagedError, match="impossible metadata, Classes"):
        read_packet(changed)


def test_the_list_of_generators_names_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_name, entry in (("good", "names"), ("broken", "[")):
        (tmp_path / run_name / "best").mkdir(parents=True)
        write(tmp_path / run_name / "best", entry=entry).rename(tmp_path / run_name / "best" / "gen.onnx")
    models = {
        Path(model["onnx"]).parts[-3:][0]: model["classes"] for model in main(["--list", str(tmp_path)])["models"]
    }
    assert models == {"drawn-cats-64": [], "good": list(NAMES), "broken": []}
    head, *lines = capsys.readouterr().err.splitlines()
    assert [line[head.index("classes")] for line in lines] == [" ", " ", "3"]
