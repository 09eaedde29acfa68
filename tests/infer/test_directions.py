"""Directions of a file's metadata: reading them, and moving latents along them."""

from __future__ import annotations

import base64
import io
import json
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from infer.cli import main
from infer.containers import DamagedError
from infer.directions import ENTRY, MAX_COUNT, encode, read_directions
from infer.latents import latents, walk
from infer.origin import read_packet
from infer.provenance import Provenance
from infer.session import Generator

Z_DIM = 16


def unit_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((count, Z_DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = unit_vectors(3)


@pytest.fixture
def moving(make_onnx: Callable[..., Path]) -> Path:
    """A generator with three directions."""
    return make_onnx(metadata={ENTRY: encode(VECTORS)})


def run(onnx: Path, *args: str | Path) -> dict[str, Any]:
    return main(["--onnx", str(onnx), "--device", "cpu", *map(str, args)])


def moved(seeds: list[int], psi: float = 1.0) -> np.ndarray:
    """The latents of --direction 1=2.5 --direction 3=-1."""
    kept = VECTORS.astype(np.float16).astype(np.float32)
    return latents(seeds, Z_DIM) * np.float32(psi) + np.float32(2.5) * kept[0] - kept[2]


AMOUNTS = ("--direction", "1=2.5", "--direction", "3=-1")


def test_what_is_encoded_is_read() -> None:
    read = read_directions({ENTRY: encode(VECTORS)}, Z_DIM, "gen.onnx")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, VECTORS, atol=5e-4)
    assert read_directions({}, Z_DIM, "gen.onnx").shape == (0, Z_DIM)
    assert len(encode(np.zeros((8, 100)))) < 2200


def test_images_of_seeds_move(moving: Path, tmp_path: Path) -> None:
    run(moving, "--seeds", "4,9", "--psi", "0.5", *AMOUNTS, "--out", tmp_path / "cats.npy")
    images = np.load(tmp_path / "cats.npy")
    np.testing.assert_array_equal(images, Generator(moving, "cpu")(moved([4, 9], 0.5)))
    assert (images != Generator(moving, "cpu")(latents([4, 9], Z_DIM) * np.float32(0.5))).any()


def test_walks_and_latents_move(moving: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", z=latents([4], Z_DIM))
    run(moving, "--latent", tmp_path / "a.npz", *AMOUNTS, "--out", tmp_path / "cats.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "cats.npy"), Generator(moving, "cpu")(moved([4])))
    run(moving, "--seeds", "4,9", *AMOUNTS, "--interpolate", tmp_path / "walk.webp")
    move = moved([4]) - latents([4], Z_DIM)
    expected = Generator(moving, "cpu")(walk(latents([4, 9], Z_DIM), 20) + move)
    with Image.open(tmp_path / "walk.webp") as film:
        film.seek(7)
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - expected[7]).max() <= 1  # move is rounded


def test_shards_record_the_directions_and_another_command_is_refused(
    moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infer import bulk

    out = tmp_path / "out"
    run(moving, "--n", 3, *AMOUNTS, "--no-metadata", "--shards", "--out", f"{out}/")
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["options"]["directions"] == {"1": 2.5, "3": -1.0}
    with tarfile.open(out / "train-000000.tar") as tar:
        assert json.loads(tar.extractfile("00000002.json").read()) == {  # type: ignore[union-attr]
            "seed": 2,
            "psi": 1.0,
            "directions": {"1": 2.5, "3": -1.0},
        }
        image = Image.open(io.BytesIO(tar.extractfile("00000002.png").read()))  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(image), Generator(moving, "cpu")(moved([2]))[0])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "write_files", stop)
    files = ("--n", 3, "--out", f"{tmp_path / 'files'}/")
    with pytest.raises(KeyboardInterrupt):
        run(moving, *files, *AMOUNTS)
    with pytest.raises(UserError, match="unfinished work of another command"):
        run(moving, *files, "--direction", "1=2.5")
    with pytest.raises(KeyboardInterrupt):  # the same, in another order
        run(moving, *files, *AMOUNTS[2:], *AMOUNTS[:2])


def test_jobs_without_directions_are_those_of_earlier_versions() -> None:
    from infer.bulk import Job

    assert "directions" not in Job("0", [1], 1.0, ".png", "CPU", False).settings()


def text(data: bytes) -> str:
    return "1 " + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("", "known version"),
        ("2 " + encode(VECTORS)[2:], "known version"),
        ("1 ***", "not base64"),
        ("1 é", "not base64"),
        (text(b"abc"), "not float16 vectors of 16"),
        (text(np.zeros((1, Z_DIM), "<f2").tobytes()), "not unit vectors"),
        (text(np.full((1, Z_DIM), np.nan, "<f2").tobytes()), "not unit vectors"),
        (text(np.full((1, Z_DIM), np.inf, "<f2").tobytes()), "not unit vectors"),
        (encode(VECTORS * 1.1), "not unit vectors"),
        (encode(unit_vectors(MAX_COUNT + 1)), "more than 64 directions"),
        ("1 " + "A" * 10_000_000, "more than 64 directions"),
    ],
)
def test_untrusted_entries(make_onnx: Callable[..., Path], tmp_path: Path, entry: str, reason: str) -> None:
    path = make_onnx(metadata={ENTRY: entry})
    with pytest.raises(UserError, match=reason) as raised:
        run(path, "--direction", "1=1", "--out", tmp_path / "a.png")
    assert len(str(raised.value)) < 300
    assert run(path, "--out", tmp_path / "a.png")["n"] == 16  # nothing else needs them


def test_a_direction_that_the_file_lacks(moving: Path, make_onnx: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"--direction 4=1: .* has the directions 1 to 3"):
        run(moving, "--direction", "4=1")
    with pytest.raises(UserError, match=r"--direction 1=1: .* has the directions none; catexport"):
        run(make_onnx(), "--direction", "1=1")


@pytest.mark.parametrize("given", ["0=1", "1", "1=", "1=x", "=1", "1=11", "1=nan", "x=1", "1000=1"])
def test_values_that_are_not_directions(moving: Path, given: str) -> None:
    with pytest.raises(UserError, match="is given, allowed"):
        run(moving, "--direction", given)


def test_a_direction_is_given_once(moving: Path) -> None:
    with pytest.raises(UserError, match="names a direction twice"):
        run(moving, "--direction", "1=1", "--direction", "1=2")


@pytest.mark.parametrize(
    "options", ["--n 3 --out a.png", "--n 2 --interpolate a.gif", "--n 2 --truncation-sweep 0.5,1 --out a.webp"]
)
def test_the_printed_command_moves_the_images_too(
    moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run(moving, *AMOUNTS, "--direction", "2=1e-05", *options.split())
    (made,) = (path for path in tmp_path.iterdir() if path.stem == "a")
    record = main(["inspect", str(made), str(moving)])["files"][0]
    assert record["directions"] == {"1": 2.5, "2": 1e-05, "3": -1.0}
    main(shlex.split(record["command"])[1:])
    assert made.with_stem("again").read_bytes() == made.read_bytes()


def test_the_printed_command_of_single_files_and_shards_moves_the_images_too(
    moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(moving, *AMOUNTS, "--n", "2", "--out", "cats/")
    for made in sorted(Path("cats").iterdir()):
        record = main(["inspect", str(made), str(moving)])["files"][0]
        main(shlex.split(record["command"])[1:])
        assert Path("again", made.name).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("text", ["1", "0=1", "1=nan", "1=inf", "1=11", "1=1;2", "x=1", "1=1," * 3])
def test_impossible_directions_in_metadata_are_damage(text: str, tmp_path: Path) -> None:
    packet = Provenance("image", "0" * 64, (1,), (1.0,), directions={1: 2.0}).packet()
    changed = packet.replace(b"1=2.0", text.encode())
    assert changed != packet
    with pytest.raises(DamagedError, match="impossible metadata, Directions"):
        read_packet(changed)


def test_a_latent_from_a_file_has_no_command(moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.latent.npz", z=np.ones((1, Z_DIM), np.float32), weights_sha256=np.array("0" * 64), loss=np.float32(1))
    run(moving, "--latent", "a.latent.npz", "--out", "a.png")
    (record,) = main(["inspect", "a.png"])["files"]
    assert (record["kind"], record["seeds"], record["command"]) == ("sheet", None, None)
    assert record["digital_source_type"].endswith("/trainedAlgorithmicMedia")
