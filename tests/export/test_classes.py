"""Files of conditional generators: the input label, and the names of the classes in the metadata."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import export.generator as module
from catgan.command import UserError
from export.directions import find_directions
from export.generator import USUAL_ABS_DIFF, export_onnx, metadata
from infer.latents import latents
from trainer.config import ModelConfig
from trainer.models import Generator, build_generator

Z_DIM, SIZE = 8, 8
NAMES = ("tabby", "tuxedo, long hair", "ähnlich")
INPUTS = {
    "dcgan": ["z", "label"],
    "r3gan": ["z", "label"],
    "stylegan2": ["z", "label", "psi"],
    "biggan": ["z", "label"],
}


def network(arch: str, names: tuple[str, ...] = NAMES) -> Generator:
    """A generator whose images are not grey, and differ between the classes."""
    torch.manual_seed(0)
    config = ModelConfig(
        arch=arch, size=SIZE, z_dim=Z_DIM, g_width=4, max_width=8, blocks=1, group_width=4, classes=names
    )
    generator = build_generator(config)
    for name, parameter in generator.named_parameters():
        if not name.startswith("mapping"):
            torch.nn.init.normal_(parameter, 0.1, 0.4)
    generator.measure([torch.randn(64, Z_DIM)])
    return generator.eval()


def images(path: Path, label: list[int], psi: float = 1.0) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {"z": latents([3] * len(label), Z_DIM), "label": np.array(label), "psi": np.array(psi, np.float32)}
    return session.run(["image"], {value.name: feed[value.name] for value in session.get_inputs()})[0]


@pytest.mark.parametrize("arch", INPUTS)
def test_the_graph_takes_a_label_and_generates_the_images_of_pytorch(arch: str, tmp_path: Path) -> None:
    generator, path = network(arch), tmp_path / "gen.onnx"
    assert export_onnx(generator, path, {}) <= USUAL_ABS_DIFF
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == INPUTS[arch]
    z, label = model.graph.input[:2]
    assert label.type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert [d.dim_param for d in label.type.tensor_type.shape.dim] == [z.type.tensor_type.shape.dim[0].dim_param]
    assert {node.op_type for node in model.graph.node} & {"Gather", "GatherND", "GatherElements"} == {"Gather"}
    assert json.loads({e.key: e.value for e in model.metadata_props}["classes"]) == list(NAMES)
    found = images(path, [2, 0, 1, 0])
    with torch.no_grad():
        z3 = torch.from_numpy(latents([3] * 4, Z_DIM))
        expected = generator(z3, label=torch.tensor([2, 0, 1, 0])).clamp(-1, 1).numpy()
    np.testing.assert_allclose(found, expected, atol=USUAL_ABS_DIFF)
    np.testing.assert_allclose(found[1], found[3], atol=1e-6)
    assert all(np.abs(found[a] - found[b]).max() > 0.02 for a, b in itertools.combinations(range(3), 2))
    if arch == "stylegan2":
        with torch.no_grad():
            mean = generator(z3[:1], psi=torch.tensor(0.0), label=torch.tensor([1])).clamp(-1, 1).numpy()
        np.testing.assert_allclose(images(path, [1], psi=0.0), mean, atol=USUAL_ABS_DIFF)


@pytest.mark.parametrize(("precision", "uint8"), [("fp16", False), ("int8", False), ("fp32", True)])
def test_other_precisions_keep_the_classes(precision: str, uint8: bool, tmp_path: Path) -> None:
    generator = network("dcgan")
    export_onnx(generator, tmp_path / "gen.onnx", {})
    export_onnx(generator, tmp_path / "other.onnx", {}, precision, uint8)
    inputs = onnx.load(tmp_path / "other.onnx").graph.input
    assert [value.type.tensor_type.elem_type for value in inputs] == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    found, expected = (images(tmp_path / name, [0, 1, 2]) for name in ("other.onnx", "gen.onnx"))
    if uint8:
        assert found.dtype == np.uint8
        found = found.transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    nearest = [int(np.abs(expected - image).mean((1, 2, 3)).argmin()) for image in found]
    assert nearest == [0, 1, 2]


def test_one_wrong_class_of_many_is_refused(tmp_path: Path) -> None:
    to_graph = module.to_graph

    def tampered(clamped: Any, z_dim: int) -> onnx.ModelProto:
        model = to_graph(clamped, z_dim)
        (table,) = [t for t in model.graph.initializer if list(t.dims) == [40, Z_DIM]]
        values = numpy_helper.to_array(table).copy()
        values[37] = values[36]
        table.CopyFrom(numpy_helper.from_array(values, table.name))
        return model

    generator = network("dcgan", tuple(map(str, range(40))))
    with mock.patch.object(module, "to_graph", tampered), pytest.raises(UserError, match="different"):
        export_onnx(generator, tmp_path / "gen.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_without_classes_the_graph_and_the_metadata_have_no_label(tmp_path: Path) -> None:
    export_onnx(network("dcgan", ()), tmp_path / "gen.onnx", {})
    model = onnx.load(tmp_path / "gen.onnx")
    assert [value.name for value in model.graph.input] == ["z"]
    assert not {"classes", "class_counts"} & {entry.key for entry in model.metadata_props}


def test_the_metadata_have_the_frequencies_of_the_training() -> None:
    metric = {"name": "fd2k_efflite0", "value": 1.0, "class_counts": [3, 4, 5]}
    assert metadata({"recipe": "r", "kimg": 1.0, "metric": metric})["class_counts"] == "[3, 4, 5]"


def test_directions_are_those_within_the_classes() -> None:
    """The classes' own difference, the largest of all here, is no direction of z."""

    class Stub(torch.nn.Module):
        z_dim, classes = 4, NAMES

        def features(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            scale = torch.tensor([4.0, 3.0, 2.0, 1.0])
            return z * scale + 1000.0 * label[:, None] * torch.tensor([0.0, 0.0, 0.0, 1.0])

    found = find_directions(Stub())  # type: ignore[arg-type]
    np.testing.assert_allclose(found, np.eye(4), atol=0.1)
