from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from catgan.command import UserError
from infer import diagnosis, session
from infer.grid import to_uint8
from infer.latents import latents
from infer.session import CPU, Generator

MakeOnnx = Callable[..., Path]
DRIVER = diagnosis.cuda_driver()
HAS_GPU = DRIVER is not None and DRIVER.gpus > 0
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")


def expected_output(path: Path, z: np.ndarray) -> np.ndarray:
    """The output of the tiny generator, computed in float64."""
    weights = {
        i.name: onnx.numpy_helper.to_array(i).astype(np.float64) for i in onnx.load_model(path).graph.initializer
    }
    small = (z.astype(np.float64) @ weights["w"]).reshape(-1, 4, 4, 4)
    large = np.zeros((len(z), 3, 10, 10))
    for y in range(4):
        for x in range(4):
            patch = np.einsum("nc,cdij->ndij", small[:, :, y, x], weights["k"])
            large[:, :, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4] += patch
    return np.tanh(large[:, :, 1:-1, 1:-1])


def test_computes_the_network(onnx_file: Path) -> None:
    generator = Generator(onnx_file, "cpu")
    z = latents(range(5), generator.z_dim)
    output = generator.output(z)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected_output(onnx_file, z), atol=1e-5)
    np.testing.assert_array_equal(generator(z), to_uint8(output))


def test_attributes_describe_the_file(onnx_file: Path) -> None:
    generator = Generator(onnx_file, "cpu")
    assert (generator.z_dim, generator.size, generator.provider) == (16, 8, CPU)
    assert generator.metadata == {"z_dim": "16", "size": "8"}


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_an_image_depends_on_its_latent_alone(onnx_file: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setitem(session.BATCH, CPU, batch)
    generator = Generator(onnx_file, "cpu")
    z = latents(range(11), generator.z_dim)
    together = generator.output(z)
    for i in range(11):
        np.testing.assert_array_equal(generator.output(z[i : i + 1])[0], together[i])
    np.testing.assert_array_equal(generator.output(z[3:9]), together[3:9])


def test_images_at_once_take_no_more_memory_than_one_may(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.session.cores", lambda: 64)
    assert Generator(onnx_file, "cpu")._at_once == 64
    monkeypatch.setattr("infer.session.MAX_VALUES", 1)
    assert Generator(onnx_file, "cpu")._at_once == 1


def test_no_latents_give_no_images(onnx_file: Path) -> None:
    assert Generator(onnx_file, "cpu")(np.zeros((0, 16), np.float32)).shape == (0, 8, 8, 3)


def test_a_file_without_metadata_is_fine(make_onnx: MakeOnnx) -> None:
    assert Generator(make_onnx(metadata={}), "cpu").z_dim == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": "latent"}, r"not a generator: latent float \[batch, 16\] -> image"),
        ({"image": "photo"}, r"not a generator: .* -> photo float \[batch, 3, 8, 8\]"),
        ({"z_type": TensorProto.DOUBLE}, "not a generator: z double"),
        ({"channels": 1}, r"image float \[batch, 1, 8, 8\], but needed"),
        ({"batch": 1}, r"z float \[1, 16\].* any batch"),
        ({"metadata": {"z_dim": "99"}}, "metadata says z_dim 99, its graph 16"),
        ({"metadata": {"size": "64"}}, "metadata says size 64, its graph 8"),
        ({"domain": "evil.ops"}, "has the operator 'evil.ops.Tanh', which is refused"),
        ({"ir_version": 99}, "needs ONNX IR version 99, onnxruntime .* upgrade onnxruntime to its newest"),
        ({"opset": 99}, "needs ONNX opset 99, onnxruntime .* upgrade onnxruntime to its newest"),
    ],
)
def test_other_models_are_refused_in_one_line(make_onnx: MakeOnnx, changes: dict[str, object], message: str) -> None:
    path = make_onnx(**changes)
    with pytest.raises(UserError, match=message) as caught:
        Generator(path, "cpu")
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 400


def test_for_a_newer_model_the_message_names_the_release_that_reads_it() -> None:
    class Old:
        __version__ = "1.22.1"

    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 11, max supported IR version: 10"
    )
    assert "upgrade onnxruntime >= 1.23" in diagnosis.why_not_loaded(Old, error)


def test_values_that_are_not_finite_are_refused(make_onnx: MakeOnnx) -> None:
    generator = Generator(make_onnx(scale=np.nan), "cpu")
    with pytest.raises(UserError, match="not finite"):
        generator(latents([0], 16))


def test_a_failure_while_generating_is_one_line(make_onnx: MakeOnnx, capfd: pytest.CaptureFixture[str]) -> None:
    generator = Generator(make_onnx(rows=7), "cpu")
    with pytest.raises(UserError, match="onnxruntime failed while generating") as caught:
        generator(latents([0], 16))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_output_of_another_shape_than_declared_is_refused(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(onnx_file, "cpu")
    monkeypatch.setattr(generator, "_session", SimpleNamespace(run=lambda *_: [np.zeros((1, 3, 1, 1), np.float32)]))
    with pytest.raises(UserError, match=r"gave \[1, 3, 1, 1\] for 1 latents"):
        generator(latents([0], 16))


def test_weights_beside_the_model_are_refused(onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the working directory, where onnxruntime would find them."""
    model = onnx.load_model(onnx_file)
    onnx.save_model(model, onnx_file, save_as_external_data=True, location="gen.data", size_threshold=0)
    assert (tmp_path / "gen.data").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="keeps weights in other files"):
        Generator("gen.onnx", "cpu")


def test_without_onnxruntime_the_message_says_how_to_install_it(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'catgan\[infer\]'"):
        Generator(onnx_file)


@without_gpu
def test_cuda_without_a_gpu_is_refused(onnx_file: Path) -> None:
    with pytest.raises(UserError, match=r"device cuda: (no NVIDIA GPU|the installed onnxruntime .* has no CUDA)"):
        Generator(onnx_file, "cuda")


@without_gpu
def test_auto_without_a_gpu_is_silent(onnx_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Generator(onnx_file, "auto").provider == CPU
    assert capfd.readouterr() == ("", "")


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_libraries_that_do_not_load_are_reported(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a machine with a GPU but without CUDA's libraries, where onnxruntime uses the CPU without a message."""
    monkeypatch.setattr(session, "why_no_cuda", lambda ort: None)
    with pytest.raises(UserError, match="device cuda: its CUDA or cuDNN libraries did not load"):
        Generator(onnx_file, "cuda")
    assert Generator(onnx_file, "auto").provider == CPU
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "using the CPU although there is an NVIDIA GPU" in err
