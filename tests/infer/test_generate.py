from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from infer import files as files_module
from infer import generate as module
from infer import walk
from infer.generate import Order, generate
from infer.grid import cell
from infer.latents import latents
from infer.output import parse_output
from infer.session import CPU, Generator


def run(
    onnx: Path, out: Path | None, n: int = 4, seed: int = 0, psi: float = 1.0, gif: Path | None = None, **more: Any
) -> dict[str, Any]:
    output = parse_output(str(out) if out else None, **more)
    return generate(Order(str(onnx), range(seed, seed + n), psi, output, str(gif) if gif else None, "cpu"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_an_image_is_the_same_file_for_any_n_and_first_seed(
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


def test_a_sheet_holds_the_images_row_by_row(onnx_file: Path, folder: Path) -> None:
    result = run(onnx_file, folder / "made" / "cats.png", n=5)
    assert result.pop("seconds") > 0
    assert result == {"out": str(folder / "made" / "cats.png"), "n": 5, "provider": CPU}
    sheet = np.asarray(Image.open(folder / "made" / "cats.png"))
    assert sheet.shape == (2 * 8, 3 * 8, 3)
    images = Generator(onnx_file, "cpu")(latents(range(5), 16))
    np.testing.assert_array_equal(sheet[:8, 16:24], images[2])
    np.testing.assert_array_equal(sheet[8:, 8:16], images[4])
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


def test_an_array_holds_the_pixels(onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    run(onnx_file, folder / "cats.npy", n=7, seed=2)
    images = np.load(folder / "cats.npy", allow_pickle=False)
    np.testing.assert_array_equal(images, Generator(onnx_file, "cpu")(latents(range(2, 9), 16)))


@pytest.mark.parametrize(("suffix", "exact"), [(".png", True), (".webp", True), (".npy", True), (".jpg", False)])
def test_single_files_in_each_format(onnx_file: Path, folder: Path, suffix: str, exact: bool) -> None:
    run(onnx_file, folder / "out", n=2, suffix=suffix)
    images = Generator(onnx_file, "cpu")(latents(range(2), 16))
    assert sorted(files(folder / "out")) == [f"cat-000000{suffix}", f"cat-000001{suffix}"]
    for i, image in enumerate(images):
        path = folder / "out" / f"cat-{i:06d}{suffix}"
        pixels = np.load(path) if suffix == ".npy" else np.asarray(Image.open(path))
        if exact:
            np.testing.assert_array_equal(pixels, image)
        else:
            assert pixels.shape == image.shape


def test_labels_are_written_below_unchanged_images(onnx_file: Path, folder: Path) -> None:
    run(onnx_file, folder / "cats.png", n=4, seed=8, labels=True)
    width, height = cell(8, ["8", "9", "10", "11"])
    assert width > 8
    assert height > 8
    sheet = np.asarray(Image.open(folder / "cats.png"))
    assert sheet.shape == (2 * height, 2 * width, 3)
    images = Generator(onnx_file, "cpu")(latents(range(8, 12), 16))
    left = (width - 8) // 2
    for i, image in enumerate(images):
        top, start = i // 2 * height, i % 2 * width + left
        np.testing.assert_array_equal(sheet[top : top + 8, start : start + 8], image)
        below = sheet[top + 8 : top + height, i % 2 * width : (i % 2 + 1) * width]
        assert below.min() < 100, "no text"


def test_a_sweep_has_a_row_for_each_psi(onnx_file: Path, folder: Path) -> None:
    run(onnx_file, folder / "sweep.png", n=3, sweep=(0.0, 0.5, 1.0, 1.5))
    sheet = np.asarray(Image.open(folder / "sweep.png"))
    assert sheet.shape == (4 * 8, 3 * 8, 3)
    generator = Generator(onnx_file, "cpu")
    for row, psi in enumerate((0.0, 0.5, 1.0, 1.5)):
        expected = generator(latents(range(3), 16) * np.float32(psi))
        np.testing.assert_array_equal(sheet[row * 8 : row * 8 + 8], np.concatenate(list(expected), axis=1))


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("cats.png", {"suffix": ".png"}, "--format needs --out DIR/ or --out -; --out is cats.png"),
        ("cats.png", {"shards": True}, "--shards needs --out DIR/"),
        (None, {"shards": True}, "--shards needs --out DIR/"),
        ("cats/", {"shards": True, "suffix": ".webp"}, "--shards are always PNG"),
        ("cats/", {"labels": True}, "--labels needs a sheet"),
        ("cats.npy", {"labels": True}, "--labels needs a sheet"),
        ("cats/", {"sweep": (1.0,)}, "--truncation-sweep needs a sheet"),
    ],
)
def test_options_of_another_kind_of_output_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, out: str | None, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        parse_output(out, **more)


def test_labels_count_towards_the_size_of_the_sheet(onnx_file: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="more than 16383 a side"):
        run(onnx_file, folder / "cats.png", n=1000**2, labels=True)
    with pytest.raises(UserError, match="more than 16383 a side; use at most --n 2047,"):
        run(onnx_file, folder / "cats.png", n=2048, sweep=(0.5, 1.0))


def test_the_walk_is_an_endless_gif_through_the_seeds(onnx_file: Path, folder: Path) -> None:
    result = run(onnx_file, None, n=3, seed=7, gif=folder / "walk.gif")
    assert result["out"] == result["interpolate"] == str(folder / "walk.gif")
    images = Generator(onnx_file, "cpu")(latents([7, 8, 9], 16))
    with Image.open(folder / "walk.gif") as gif:
        assert gif.n_frames == 3 * walk.STEPS
        assert gif.info["loop"] == 0
        assert gif.info["duration"] == walk.FRAME_MS
        for i, image in enumerate(images):
            gif.seek(i * walk.STEPS)
            # 64 pixels fit a palette of 256 colours, so a key frame is almost exact.
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - image).mean() < 2
    assert list(files(folder)) == ["walk.gif"]


def test_the_walk_as_webp(onnx_file: Path, folder: Path) -> None:
    run(onnx_file, None, n=3, gif=folder / "walk.webp")
    image = Generator(onnx_file, "cpu")(latents([0], 16))[0]
    with Image.open(folder / "walk.webp") as film:
        assert (film.format, film.info["loop"]) == ("WEBP", 0)
        np.testing.assert_array_equal(np.asarray(film.convert("RGB")), image)
        durations = []
        for i in range(film.n_frames):  # equal frames are joined
            film.seek(i)
            film.load()
            durations.append(film.info["duration"])
    assert sum(durations) == 3 * walk.STEPS * walk.FRAME_MS
    assert len(durations) > 2 * walk.STEPS
    assert list(files(folder)) == ["walk.webp"]


def test_the_walk_as_mp4(onnx_file: Path, folder: Path) -> None:
    av = pytest.importorskip("av")
    run(onnx_file, None, n=3, gif=folder / "walk.mp4")
    with av.open(str(folder / "walk.mp4")) as video:
        (stream,) = video.streams
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert len(frames) == 3 * walk.STEPS
    # In yuv420p only colours lose resolution, so compare the brightness with that of the key images.
    images = Generator(onnx_file, "cpu")(latents(range(3), 16))
    errors = [[np.abs(f.mean(axis=2) - p.mean(axis=2)).mean() for p in images] for f in frames[:: walk.STEPS]]
    assert np.argmin(errors, axis=1).tolist() == [0, 1, 2]
    assert list(files(folder)) == ["walk.mp4"]


def test_odd_sides_fit_mp4(folder: Path) -> None:
    av = pytest.importorskip("av")
    walk.write_walk(folder / "odd.mp4", iter(np.zeros((3, 33, 33, 3), np.uint8)))
    with av.open(str(folder / "odd.mp4")) as video:
        assert (video.streams.video[0].width, video.streams.video[0].height) == (34, 34)


def test_without_pyav_mp4_is_refused_before_anything(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"MP4 needs PyAV.* pip install 'catgan\[video\]'.* \.gif or \.webp"):
        run(onnx_file, folder / "cats.png", gif=folder / "walk.mp4")
    assert list(folder.iterdir()) == []


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
        (None, "walk.png", 4, "ends with .gif, .webp or .mp4"),
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
    monkeypatch.setattr(Generator, "_run", lambda self, z: pytest.fail("generated"))
    with pytest.raises(UserError, match=message):
        generate(Order(str(onnx_file), range(n), output=parse_output(out), interpolate=gif, device="cpu"))
    assert sorted(folder.rglob("*")) == before
    assert (folder / "taken").read_text() == "mine"


def test_a_folder_without_write_permission(onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(files_module.tempfile, "TemporaryFile", refuse)
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

    monkeypatch.setattr(Generator, "_run", interrupt)
    for out, gif in ((folder / "cats.png", None), (None, folder / "walk.gif")):
        with pytest.raises(KeyboardInterrupt):
            run(onnx_file, out, gif=gif)
    assert list(folder.iterdir()) == []


def test_longer_work_reports_progress(
    onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0)
    run(onnx_file, folder / "out", n=5)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["2/5", "4/5"]
