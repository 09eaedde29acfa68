"""Files with latents: what is written, what is read, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catgan.command import UserError
from infer.cli import main
from infer.latentfile import MAX_BYTES, read_latent, write_latent
from infer.latents import latents, walk
from infer.session import Generator

Z_DIM = 16
SHA256 = "ab" * 32


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    """The latent of seed 3."""
    path = tmp_path / "mine.latent.npz"
    write_latent(path, latents([3], Z_DIM), SHA256, 0.25)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def test_numpy_reads_what_is_written_and_it_has_the_same_bytes(latent: Path, tmp_path: Path) -> None:
    with np.load(latent, allow_pickle=False) as file:
        assert (file["z"].dtype, file["z"].shape) == (np.float32, (1, Z_DIM))
        np.testing.assert_array_equal(file["z"], latents([3], Z_DIM))
        assert (str(file["weights_sha256"]), float(file["loss"])) == (SHA256, 0.25)
    write_latent(tmp_path / "again.npz", latents([3], Z_DIM), SHA256, 0.25)
    assert (tmp_path / "again.npz").read_bytes() == latent.read_bytes()
    read = read_latent(latent)
    np.testing.assert_array_equal(read.z, latents([3], Z_DIM))
    assert read.weights_sha256 == SHA256


def test_a_file_of_ones_own_with_z_alone(tmp_path: Path) -> None:
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        save(path, z=latents([5], Z_DIM))
        read = read_latent(path)
        np.testing.assert_array_equal(read.z, latents([5], Z_DIM))
        assert read.weights_sha256 is None


GOOD = npy(latents([0], Z_DIM))
HUGE = GOOD.replace(b"(1, 16), }         ", b"(1, 99999999999), }")
HOSTILE = {
    "no zip": (b"z", "not a latent"),
    "empty": (b"", "not a latent"),
    "truncated": (zipped(z=GOOD)[:150], "not a latent"),
    "no z": (zipped(w=GOOD), "no z"),
    "object": (zipped(z=npy(np.array([[{}]], dtype=object))), "is not of type <f4"),
    "pickle": (pickle.dumps(1), "not a latent"),
    "double": (zipped(z=npy(np.zeros((1, 16)))), "is not of type <f4"),
    "fortran": (zipped(z=npy(np.asfortranarray(np.zeros((2, 16), np.float32)))), "is not of type <f4"),
    "two latents": (zipped(z=npy(np.zeros((2, 16), np.float32))), r"z has the shape \[2, 16\]"),
    "flat": (zipped(z=npy(np.zeros(16, np.float32))), r"z has the shape \[16\]"),
    "none": (zipped(z=npy(np.zeros((1, 0), np.float32))), r"z has the shape \[1, 0\]"),
    "NaN": (zipped(z=npy(np.full((1, 16), np.nan, np.float32))), "not finite"),
    "infinite": (zipped(z=npy(np.full((1, 16), np.inf, np.float32))), "not finite"),
    "declares more": (zipped(z=HUGE), "does not hold as many values"),
    "header": (zipped(z=b"\x93NUMPY\x01\x00\x0a\x00" + b"(" * 9 + b"\n"), "is not of type <f4"),
    "bomb": (zipped(zipfile.ZIP_DEFLATED, z=bytes(100 * MAX_BYTES)), "more than 1,048,576 bytes"),
    "large": (bytes(MAX_BYTES + 1), "more than 1,048,576 bytes"),
    "lzma": (zipped(zipfile.ZIP_LZMA, z=GOOD), "compressed in a way"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_line(kind: str, onnx_file: Path, tmp_path: Path) -> None:
    content, reason = HOSTILE[kind]
    path = tmp_path / "hostile.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as raised:
        main(["--onnx", str(onnx_file), "--latent", str(path), "--out", str(tmp_path / "cats.png"), "--device", "cpu"])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cats.png").exists()


def test_damaged_files_raise_nothing_else(latent: Path, tmp_path: Path) -> None:
    data, path = latent.read_bytes(), tmp_path / "damaged.npz"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in random.integers(len(data), size=3):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            z = read_latent(path).z
            assert z.shape[0] == 1
            assert np.isfinite(z).all()
        except UserError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("digest", [npy(np.array("x" * 64)), npy(np.array("x" * 64)).replace(b"x\0\0\0", b"\xff" * 4)])
def test_a_digest_that_is_none_is_unknown(tmp_path: Path, digest: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(zipped(z=GOOD, weights_sha256=digest))
    assert read_latent(tmp_path / "a.npz").weights_sha256 is None


def run(onnx: Path, *args: str | Path) -> dict[str, object]:
    return main(["--onnx", str(onnx), "--device", "cpu", *map(str, args)])


def test_latents_take_the_place_of_seeds(onnx_file: Path, latent: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, z=latents([7], Z_DIM))
    given = ("--latent", latent, "--latent", other, "--psi", 0.7, "--no-metadata")
    chosen = ("--seeds", "3,7", "--psi", 0.7, "--no-metadata")
    for name in ("sheet.png", "cats.npy"):
        assert run(onnx_file, *given, "--out", tmp_path / f"a{name}")["n"] == 2
        run(onnx_file, *chosen, "--out", tmp_path / f"b{name}")
        assert (tmp_path / f"a{name}").read_bytes() == (tmp_path / f"b{name}").read_bytes()
    run(onnx_file, *given, "--interpolate", tmp_path / "walk.webp")
    expected = Generator(onnx_file, "cpu")(walk(latents([3, 7], Z_DIM), 20) * np.float32(0.7))
    with Image.open(tmp_path / "walk.webp") as film:
        assert film.n_frames == 40
        for i in (0, 10, 20, 33):
            film.seek(i)
            np.testing.assert_array_equal(np.asarray(film.convert("RGB")), expected[i])


def test_labels_are_the_names_of_the_files(onnx_file: Path, latent: Path, tmp_path: Path, monkeypatch) -> None:
    import infer.generate as module

    labels: list[str] = []
    grid = module.grid
    monkeypatch.setattr(module, "grid", lambda *a: labels.extend(a[2]) or grid(*a))
    run(onnx_file, "--latent", latent, "--labels", "--out", tmp_path / "a.png")
    assert labels == ["mine"]


def test_a_latent_of_other_weights_is_named(
    make_onnx: Callable[..., Path], latent: Path, tmp_path: Path, capsys
) -> None:
    out = ("--latent", latent, "--out", tmp_path / "a.png")
    run(make_onnx(metadata={"weights_sha256": SHA256}), *out)
    run(make_onnx(metadata={}), *out)
    assert capsys.readouterr().err == ""
    run(make_onnx(metadata={"weights_sha256": "cd" * 32}), *out)
    assert "was made for the weights abababababab, " in (err := capsys.readouterr().err)
    assert "has cdcdcdcdcdcd" in err


def test_a_latent_of_another_size(onnx_file: Path, tmp_path: Path) -> None:
    write_latent(tmp_path / "a.npz", latents([0], 12), SHA256, 0)
    with pytest.raises(UserError, match=r"has 12 values, but .* needs 16; it was made for another generator"):
        run(onnx_file, "--latent", tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--n", "2"], "omit --n, --seed and --seeds"),
        (["--seed", "0"], "omit --n, --seed and --seeds"),
        (["--benchmark"], "omit all options but"),
        (["--out", "cats/"], "single files are named by seed"),
        (["--out", "cats/", "--shards"], "single files are named by seed"),
        (["--interpolate", "walk.gif"], "1 given"),
    ],
)
def test_what_does_not_go_with_a_latent(onnx_file: Path, latent: Path, args: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run(onnx_file, "--latent", latent, *args)


def test_a_missing_file(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        run(onnx_file, "--latent", tmp_path / "none.npz")


def test_the_json_counts_latents(onnx_file: Path, latent: Path, tmp_path: Path) -> None:
    result = json.loads(json.dumps(run(onnx_file, "--latent", latent, "--out", tmp_path / "a.png")))
    assert {key: result[key] for key in ("n", "out")} == {"n": 1, "out": str(tmp_path / "a.png")}
