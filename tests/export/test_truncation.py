"""A generator with a mapping network: psi is an input of its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import export.generator as module
from catgan.command import UserError
from export.card import write_card
from export.generator import USUAL_ABS_DIFF, export_onnx
from infer.latents import latents
from infer.session import Generator
from trainer.config import ModelConfig
from trainer.models import build_generator

Z_DIM = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    generator = build_generator(ModelConfig(arch="stylegan2", size=8, z_dim=Z_DIM, g_width=4, max_width=8))
    for parameter in generator.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    generator.measure([torch.randn(64, Z_DIM)])
    path = tmp_path_factory.mktemp("stylegan2") / "gen.onnx"
    assert export_onnx(generator, path, {"recipe": "stylegan2-8"}) <= USUAL_ABS_DIFF
    return generator.eval(), path


@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0, 1.5])
def test_onnxruntime_generates_the_images_of_pytorch(exported: tuple[nn.Module, Path], psi: float) -> None:
    generator, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    z = latents(range(3), Z_DIM)
    (image,) = session.run(["image"], {"z": z, "psi": np.array(psi, np.float32)})
    with torch.no_grad():
        expected = generator(torch.from_numpy(z), psi=torch.tensor(psi)).clamp(-1, 1).numpy()
        if psi == 1.0:
            np.testing.assert_allclose(image, generator(torch.from_numpy(z)).clamp(-1, 1), atol=USUAL_ABS_DIFF)
    assert expected.std() > 0.05, "images of one colour would prove little"
    assert (np.abs(image[0] - image[1]).max() < 1e-5) == (psi == 0.0)
    np.testing.assert_allclose(image, expected, atol=USUAL_ABS_DIFF)


def test_the_graph_has_shared_weights_and_no_groups(exported: tuple[nn.Module, Path]) -> None:
    graph = onnx.load(exported[1]).graph
    assert [value.name for value in graph.input] == ["z", "psi"]
    assert len(graph.input[1].type.tensor_type.shape.dim) == 0
    weights = {tensor.name for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3 + 2, "those of the maps and those to RGB"
    for node in convolutions:
        assert node.input[1] in weights
        assert [a.i for a in node.attribute if a.name == "group"] in ([], [1])


@pytest.mark.slow
def test_the_parity_check_covers_psi(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """A graph with another mean w gives the same images at psi 1 only, and is not written."""
    generator, _ = exported
    to_graph = module.to_graph

    def tampered(clamped: Any, z_dim: int) -> onnx.ModelProto:
        mean = clamped.generator.mean_w
        kept = mean.clone()
        mean.add_(1.0)
        model = to_graph(clamped, z_dim)
        mean.copy_(kept)
        return model

    with mock.patch.object(module, "to_graph", tampered), pytest.raises(UserError, match="different"):
        export_onnx(generator, tmp_path / "gen.onnx", {})


def test_the_cards_program_generates(exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = exported
    text = write_card(path, {"recipe": "stylegan2-8", "kimg": 1.0}, 0.0).read_text()
    assert "is the graph's input `psi`" in text
    program = re.search(r"    import numpy, onnxruntime\n(?:    .*\n)+", text)
    assert program is not None
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {}
    exec(re.sub("^    ", "", program[0], flags=re.MULTILINE), names)
    z = np.random.default_rng(0).standard_normal((4, Z_DIM), dtype=np.float32)
    np.testing.assert_allclose(names["image"], Generator(path, "cpu").output(z), atol=USUAL_ABS_DIFF)
