from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.generator import annotate, export_onnx
from infer.latents import latents
from infer.session import Generator
from tests.trainer.tiny import tiny
from trainer.ema import EMA
from trainer.models import build_generator
from trainer.recipes import FAMILIES

pytestmark = pytest.mark.slow

LEFTOVERS = {"BatchNormalization", "Identity", "Dropout", "Constant", "Shape", "Slice", "Concat", "Expand"}
DISTINCT = {str(tiny(family).model): family for family in FAMILIES}.values()


def generator_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    generator = build_generator(replace(tiny(family).model, g_width=8, max_width=16))
    for parameter in generator.parameters():
        nn.init.normal_(parameter, 0.05, 0.3)
    ema = EMA(generator, half_life=0, ramp=0)
    ema.recompute_statistics([torch.randn(64, 8)])  # spectral norm's are those of the weights before
    return ema.module


@pytest.mark.parametrize("family", DISTINCT)
def test_every_recipe_in_every_precision(family: str, tmp_path: Path) -> None:
    generator = generator_of(family)
    z = np.concatenate([latents(range(8), 8), np.zeros((1, 8), np.float32)])
    images = {}
    for precision in ("fp32", "fp16", "int8"):
        path = tmp_path / f"{precision}.onnx"
        export_onnx(generator, path, {}, precision)
        # BigGAN's follows a sum or precedes an activation, so no convolution can take it.
        leftovers = LEFTOVERS - {"BatchNormalization"} if family.startswith("biggan") else LEFTOVERS
        assert not leftovers & {node.op_type for node in onnx.load(path).graph.node}
        images[precision] = Generator(path, "cpu")(z).astype(int)
    assert images["fp32"].std() > 5
    assert np.abs(images["fp16"] - images["fp32"]).max() <= 8
    export_onnx(generator, tmp_path / "uint8.onnx", {}, uint8=True)
    rounded = Generator(tmp_path / "uint8.onnx", "cpu")
    assert rounded.is_uint8
    np.testing.assert_array_equal(rounded(z), images["fp32"])


def test_annotate_adds_and_replaces(tmp_path: Path) -> None:
    export_onnx(generator_of("dcgan"), tmp_path / "gen.onnx", {"recipe": "a"})
    annotate(tmp_path / "gen.onnx", {"recipe": "b", "onnx_metric_value": "3"})
    entries = Generator(tmp_path / "gen.onnx", "cpu").metadata
    assert (entries["recipe"], entries["onnx_metric_value"], entries["z_dim"]) == ("b", "3", "8")
