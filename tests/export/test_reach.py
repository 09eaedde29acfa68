"""Exported generators in other runtimes: older releases of onnxruntime, OpenCV, OpenVINO, ONNX's reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx.reference
import onnxruntime
import pytest
import torch

from export.generator import USUAL_ABS_DIFF, export_onnx
from infer.latents import latents
from trainer.config import ModelConfig
from trainer.models import ARCHITECTURES, build_generator

BATCHES = (1, 3)
Z_DIM = 8


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "biggan, attention"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    arch, _, attention = request.param.partition(", ")
    config = ModelConfig(arch=arch, size=16, z_dim=Z_DIM, g_width=4, max_width=8, blocks=1, group_width=4)
    if attention:
        config = replace(config, attention=8, g_spectral_norm=True)
    generator = build_generator(config)
    if attention:
        torch.nn.init.ones_(generator.blocks.up8.attention.gain.weight)
    path = tmp_path_factory.mktemp("exported") / "gen.onnx"
    export_onnx(generator, path, {"recipe": arch})
    return path


def expected(path: Path, batch: int) -> tuple[np.ndarray, np.ndarray]:
    z = latents(range(batch), Z_DIM)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.run(["image"], feed(path, z))
    return z, image


def feed(path: Path, z: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of the file."""
    values = {"z": z, "psi": np.array(1, np.float32)}
    return {value.name: values[value.name] for value in onnx.load(path).graph.input}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_reference_evaluator_generates_the_same(exported: Path, batch: int) -> None:
    z, image = expected(exported, batch)
    (image_again,) = onnx.reference.ReferenceEvaluator(str(exported)).run(["image"], feed(path=exported, z=z))
    np.testing.assert_allclose(image_again, image, atol=USUAL_ABS_DIFF)


@pytest.mark.parametrize("batch", BATCHES)
def test_opencv_generates_the_same(exported: Path, batch: int) -> None:
    z, image = expected(exported, batch)
    net = cv2.dnn.readNetFromONNX(str(exported))
    for name, value in feed(exported, z).items():
        net.setInput(np.atleast_1d(value), name)
    np.testing.assert_allclose(net.forward("image"), image, atol=USUAL_ABS_DIFF)


def install(folder: Path, *packages: str) -> None:
    """Install packages and their dependencies to a folder; skips the test if no index can be reached."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(folder)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {packages[0]}: {done.stderr.strip().splitlines()[-1]}")


def run_in(folder: Path, program: str, *arguments: object) -> dict[str, object]:
    """Run a program with the packages of ``folder`` only. Returns the JSON object that it prints last."""
    command = [sys.executable, "-S", "-c", program, *map(str, arguments)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


GENERATE_WITH_CATINFER = """
import json, sys
import numpy as np, onnxruntime
from infer.session import Generator
from infer.latents import latents
_, path, out = sys.argv
generator = Generator(path, "cpu")
np.save(out, generator.output(latents(range(3), generator.z_dim)))
print(json.dumps({"version": onnxruntime.__version__}))
"""


@pytest.fixture(scope="module", params=["1.15.0", "1.17.3"])
def old_onnxruntime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("onnxruntime")
    install(folder, f"onnxruntime=={request.param}", "numpy<2", "pillow")
    return request.param, folder


@pytest.mark.soak
@pytest.mark.slow
def test_old_onnxruntimes_generate_the_same(exported: Path, old_onnxruntime: tuple[str, Path], tmp_path: Path) -> None:
    """With our own code, including the checks of untrusted files."""
    version, folder = old_onnxruntime
    _, image = expected(exported, 3)
    assert run_in(folder, GENERATE_WITH_CATINFER, exported, tmp_path / "image.npy") == {"version": version}
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), image, atol=USUAL_ABS_DIFF)


GENERATE_WITH_OPENVINO = """
import json, sys
import numpy as np, openvino
_, path, inputs, out = sys.argv
model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(out, model(dict(np.load(inputs)))["image"])
print(json.dumps({}))
"""


@pytest.fixture(scope="module")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    install(folder, "openvino")
    return folder


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_openvino_generates_the_same(exported: Path, openvino: Path, tmp_path: Path, batch: int) -> None:
    z, image = expected(exported, batch)
    np.savez(tmp_path / "inputs.npz", **feed(exported, z))
    run_in(openvino, GENERATE_WITH_OPENVINO, exported, tmp_path / "inputs.npz", tmp_path / "image.npy")
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), image, atol=USUAL_ABS_DIFF)
