"""Graphs with the input ``psi``: it gets --psi instead of the latents, and nothing but a scalar is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from catgan.command import UserError
from infer.cli import main as catinfer
from infer.diagnosis import CPU
from infer.latents import latents, walk
from infer.session import BATCH, Generator
from infer.walk import STEPS
from tests.infer.conftest import Z_DIM, build

MakeOnnx = Callable[..., Path]


def truncating(
    name: str = "psi", kind: int = TensorProto.FLOAT, dims: Sequence[int | str] | None = (), first: bool = False
) -> onnx.ModelProto:
    """The tiny generator, which clips z to [-psi, psi]: other images than those of z * psi. Each argument makes the
    input ``psi`` invalid in one way."""
    model = build()
    graph = model.graph
    psi = helper.make_tensor_value_info(name, kind, dims)
    graph.input.insert(0, psi) if first else graph.input.append(psi)
    nodes = list(graph.node)
    del graph.node[:]
    is_float = kind == TensorProto.FLOAT
    limit = name if is_float else "limit"
    graph.node.extend([] if is_float else [helper.make_node("Cast", [name], [limit], to=TensorProto.FLOAT)])
    graph.node.append(helper.make_node("Neg", [limit], ["negative"]))
    graph.node.append(helper.make_node("Max", ["z", "negative"], ["raised"]))
    graph.node.append(helper.make_node("Min", ["raised", limit], ["clipped"]))
    nodes[0].input[0] = "clipped"
    graph.node.extend(nodes)
    return model


@pytest.fixture
def psi_file(tmp_path: Path) -> Path:
    path = tmp_path / "psi.onnx"
    path.write_bytes(truncating().SerializeToString())
    return path


def clipped(seeds: Sequence[int], psi: float) -> np.ndarray:
    return np.clip(latents(seeds, Z_DIM), -np.float32(psi), np.float32(psi))


def clipped_image(plain: Generator, z: np.ndarray, psi: float) -> np.ndarray:
    return plain(np.clip(z, -psi, psi)[None])


def test_psi_goes_into_the_graph_and_latents_stay(psi_file: Path, onnx_file: Path) -> None:
    generator, plain = Generator(psi_file, "cpu"), Generator(onnx_file, "cpu")
    assert generator.has_psi
    assert not plain.has_psi
    z = latents(range(5), Z_DIM)
    for psi in (1.0, 0.5, 0.0):
        np.testing.assert_array_equal(generator(z, psi), plain(clipped(range(5), psi)))
        np.testing.assert_array_equal(generator.output(z, psi), plain.output(clipped(range(5), psi)))
        np.testing.assert_array_equal(plain(z, psi), plain(z * np.float32(psi)))
    np.testing.assert_array_equal(generator(z), generator(z, 1.0))
    assert not np.array_equal(generator(z, 0.5), plain(z, 0.5))


@pytest.mark.parametrize("batch", [1, 4])
def test_each_image_may_have_a_psi_of_its_own(
    psi_file: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setitem(BATCH, CPU, batch)
    generator, plain = Generator(psi_file, "cpu"), Generator(onnx_file, "cpu")
    z, psis = latents(range(7), Z_DIM), np.float32([1, 1, 0.5, 0, 0, 0.5, 1])
    np.testing.assert_array_equal(
        generator(z, psis), np.concatenate([clipped_image(plain, *of) for of in zip(z, psis, strict=True)])
    )
    np.testing.assert_array_equal(plain(z, psis), plain(z * psis[:, None]))


def test_a_move_is_added_after_the_latent_was_scaled(psi_file: Path, onnx_file: Path) -> None:
    generator, plain = Generator(psi_file, "cpu"), Generator(onnx_file, "cpu")
    z, move = latents(range(3), Z_DIM), np.linspace(-1, 1, Z_DIM, dtype=np.float32)
    np.testing.assert_array_equal(generator(z, 0.5, move), plain(np.clip(z + move, -0.5, 0.5)))
    np.testing.assert_array_equal(plain(z, 0.5, move), plain(z * np.float32(0.5) + move))


def test_sheets_sweeps_files_and_walks(psi_file: Path, onnx_file: Path, tmp_path: Path) -> None:
    plain = Generator(onnx_file, "cpu")
    order = ["--onnx", str(psi_file), "--n", "3", "--device", "cpu"]
    catinfer([*order, "--psi", "0.5", "--out", str(tmp_path / "half.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "half.npy"), plain(clipped(range(3), 0.5)))

    catinfer([*order, "--truncation-sweep", "0,0.5,1", "--out", str(tmp_path / "sweep.png")])
    sheet = np.asarray(Image.open(tmp_path / "sweep.png"))
    for row, psi in enumerate((0.0, 0.5, 1.0)):
        expected = plain(clipped(range(3), psi))
        np.testing.assert_array_equal(sheet[8 * row : 8 * row + 8], np.concatenate(list(expected), axis=1))
    np.testing.assert_array_equal(sheet[:8, :8], sheet[:8, 8:16])

    catinfer([*order, "--psi", "0.5", "--shards", "--out", str(tmp_path / "shards")])
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["options"]["psi"] == 0.5
    contacts = np.asarray(Image.open(tmp_path / "shards" / "contact.png"))
    np.testing.assert_array_equal(contacts[:8, :8], plain(clipped([0], 0.5))[0])

    catinfer([*order, "--psi", "0.5", "--interpolate", str(tmp_path / "walk.webp")])
    with Image.open(tmp_path / "walk.webp") as film:
        film.seek(STEPS // 2)
        between = walk(latents(range(3), Z_DIM), STEPS)[STEPS // 2 : STEPS // 2 + 1]
        np.testing.assert_array_equal(np.asarray(film.convert("RGB")), plain(np.clip(between, -0.5, 0.5))[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "truncation"},
        {"kind": TensorProto.DOUBLE},
        {"kind": TensorProto.INT64},
        {"dims": (1,)},
        {"dims": ("batch", 1)},
        {"dims": (1, 2**40)},
        {"first": True},
    ],
)
def test_other_second_inputs_are_refused(tmp_path: Path, wrong: dict) -> None:
    path = tmp_path / "gen.onnx"
    path.write_bytes(truncating(**wrong).SerializeToString())
    with pytest.raises(UserError, match=r"gen\.onnx: "):
        Generator(path, "cpu")


def test_a_third_input_is_refused(tmp_path: Path) -> None:
    model = truncating()
    model.graph.input.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, []))
    (tmp_path / "gen.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"not a generator: z float .*, psi float .*, noise float"):
        Generator(tmp_path / "gen.onnx", "cpu")


def test_a_shape_that_depends_on_psi_is_refused(tmp_path: Path) -> None:
    """It would be known only at run time."""
    model = truncating()
    model.graph.node.append(helper.make_node("Cast", ["psi"], ["count"], to=TensorProto.INT64))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    model.graph.node.append(helper.make_node("Reshape", ["count", "one"], ["dims"]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["dims"], ["filled"]))
    (tmp_path / "gen.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="only known when it runs"):
        Generator(tmp_path / "gen.onnx", "cpu")
