from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer import generate as module
from infer.command import UserError
from infer.generate import generate
from infer.latents import latents
from infer.session import CPU, Generator


def run(onnx: Path, out: Path | None, n: int = 4, seed: int = 0, psi: float = 1.0, gif: Path | None = None) -> dict:
    return generate(str(onnx), n, seed, psi, str(out) if out else None, str(gif) if gif else None, "cpu")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_picture_is_the_same_file_for_any_n_and_first_seed(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(onnx_file, folder / "nine", n=9)
    monkeypatch.setattr(module, "CHUNK", 3)
    run(onnx_file, folder / "four", n=4)
    run(onnx_file, folder / "later", n=2, seed=5)
    nine = files(folder / "nine")
    assert sorted(nine) == [f"cat-{i:06d}.png" for i in range(9)]
    assert len(set(nine.values())) == 9
    assert files(folder / "four") == {k: nine[k] for k in sorted(nine)[:4]}
    assert files(folder / "later") == {k: nine[k] for k in sorted(nine)[5:7]}


def test_a_sheet_holds_the_pictures_row_by_row(onnx_file: Path, folder: Path) -> None:
    result = run(onnx_file, folder / "made" / "cats.png", n=5)
    assert result.pop("seconds") > 0
    assert result == {"out": str(folder / "made" / "cats.png"), "n": 5, "provider": CPU}
    sheet = np.asarray(Image.open(folder / "made" / "cats.png"))
    assert sheet.shape == (2 * 8, 3 * 8, 3)
    pictures = Generator(onnx_file, "cpu")(latents(range(5), 16))
    np.testing.assert_array_equal(sheet[:8, 16:24], pictures[2])
    np.testing.assert_array_equal(sheet[8:, 8:16], pictures[4])
    assert list(files(folder / "made")) == ["cats.png"]


@pytest.mark.parametrize(
    ("name", "format"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG")]
)
def test_the_suffix_chooses_the_format(onnx_file: Path, folder: Path, name: str, format: str) -> None:
    run(onnx_file, folder / name)
    with Image.open(folder / name) as sheet:
        assert (sheet.format, sheet.size) == (format, (16, 16))


def test_psi_scales_the_latents(onnx_file: Path, folder: Path) -> None:
    run(onnx_file, folder / "half", n=2, psi=0.5)
    expected = Generator(onnx_file, "cpu")(latents([0, 1], 16) * np.float32(0.5))
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "half" / f"cat-{i:06d}.png")), expected[i])


def test_the_walk_is_an_endless_gif_through_the_seeds(onnx_file: Path, folder: Path) -> None:
    result = run(onnx_file, None, n=3, seed=7, gif=folder / "walk.gif")
    assert result["out"] == result["interpolate"] == str(folder / "walk.gif")
    pictures = Generator(onnx_file, "cpu")(latents([7, 8, 9], 16))
    with Image.open(folder / "walk.gif") as gif:
        assert gif.n_frames == 3 * module.STEPS
        assert gif.info["loop"] == 0
        assert gif.info["duration"] == module.FRAME_MS
        for i, picture in enumerate(pictures):
            gif.seek(i * module.STEPS)
            # 64 pixels fit a palette of 256 colours, so a key frame is almost exact.
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - picture).mean() < 2
    assert list(files(folder)) == ["walk.gif"]


def test_out_and_walk_together(onnx_file: Path, folder: Path) -> None:
    result = run(onnx_file, folder / "cats.png", n=2, gif=folder / "walk.gif")
    assert result["out"] == str(folder / "cats.png")
    assert sorted(files(folder)) == ["cats.png", "walk.gif"]


@pytest.mark.parametrize(
    ("out", "gif", "n", "message"),
    [
        ("cats.bmp", None, 4, "one sheet ends with .png"),
        ("", None, 4, "--out is empty"),
        ("taken", None, 4, "one sheet ends with"),
        ("taken/", None, 4, "taken"),
        ("taken/cats.png", None, 4, "taken"),
        ("folder.png", None, 4, "is a directory"),
        ("x" * 300 + ".png", None, 4, "File name too long"),
        ("big.png", None, 2047**2 + 1, r"would be .* use at most --n 4190209, or --out DIR/"),
        (None, "walk.mp4", 4, "MP4 is not written yet"),
        (None, "walk.png", 4, "ends with .gif"),
        (None, "walk.gif", 1, "2 to 200 seeds"),
        (None, "walk.gif", 201, "2 to 200 seeds"),
        (None, "folder.gif", 4, "is a directory"),
        ("cats.png", "taken/walk.gif", 4, "taken"),
    ],
)
def test_mistakes_are_found_before_generating(
    onnx_file: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str | None,
    gif: str | None,
    n: int,
    message: str,
) -> None:
    (folder / "taken").write_text("mine")
    (folder / "folder.png").mkdir()
    (folder / "folder.gif").mkdir()
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Generator, "images", lambda self, z: pytest.fail("generated"))
    with pytest.raises(UserError, match=message):
        generate(str(onnx_file), n, 0, 1.0, out, gif, "cpu")
    assert sorted(folder.rglob("*")) == before
    assert (folder / "taken").read_text() == "mine"


def test_a_folder_without_write_permission(onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"{folder}: Permission denied"):
        run(onnx_file, folder / "cats.png")


def test_a_bad_model_makes_no_folder(onnx_file: Path, folder: Path) -> None:
    onnx_file.write_bytes(b"junk")
    with pytest.raises(UserError):
        run(onnx_file, folder / "new" / "cats.png")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["cats.png", "walk.gif"])
def test_a_full_disk_leaves_the_old_file(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / name).write_text("old")

    def save(self: Image.Image, file: object, *args: object, **options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match=f"{name}: cannot be written .No space left"):
        run(
            onnx_file,
            *((folder / name,) if name.endswith(".png") else (None,)),
            gif=folder / name if "gif" in name else None,
        )
    assert files(folder) == {name: b"old"}


def test_an_interruption_leaves_whole_files_only(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Generator, z: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "images", interrupt)
    for out, gif in ((folder / "cats.png", None), (None, folder / "walk.gif")):
        with pytest.raises(KeyboardInterrupt):
            run(onnx_file, out, gif=gif)
    assert list(folder.iterdir()) == []


def test_longer_work_tells_how_far_it_is(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0)
    run(onnx_file, folder / "out", n=5)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["2/5", "4/5"]
