from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import export.generator
from catgan.command import UserError
from export.generator import USUAL_ABS_DIFF, export_onnx, metadata, weights_sha256
from export.graph import IR_VERSION, OPSET
from trainer.config import ModelConfig
from trainer.models import build_generator

ARCHITECTURES = {
    "dcgan": ModelConfig(arch="dcgan", size=16, z_dim=8, g_width=4),
    "r3gan": ModelConfig(arch="r3gan", size=16, z_dim=8, g_width=4, max_width=8, blocks=1, group_width=4),
}


class Linear(nn.Module):
    """The smallest generator: one matrix, whose output is far outside [-1, 1]."""

    z_dim, size = 4, 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3 * 8 * 8))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.matrix).reshape(-1, 3, 8, 8)


BIAS = np.float32(0.125)


class Constant(Linear):
    """Every value of an image is ``BIAS``, a sum of a product with z, which is zero, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix.data.zero_()
        self.bias = nn.Parameter(torch.full((3 * 8 * 8,), float(BIAS)))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.matrix + self.bias).reshape(-1, 3, 8, 8)


def trained(config: ModelConfig) -> nn.Module:
    """With random weights and running statistics: those of new networks are nearly neutral."""
    torch.manual_seed(0)
    generator = build_generator(config)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    generator.train()
    for _ in range(3):
        generator(torch.randn(16, config.z_dim))
    return generator


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, float]:
    generator = trained(ARCHITECTURES[request.param])
    path = tmp_path_factory.mktemp(request.param) / "new" / "gen.onnx"
    difference = export_onnx(generator, path, {"recipe": request.param, "kimg": "12"})
    assert generator.training, "the generator must not change"
    return generator, path, difference


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_onnxruntime_generates_the_images_of_pytorch(exported: tuple[nn.Module, Path, float], batch: int) -> None:
    generator, path, difference = exported
    z = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = generator.eval()(z).clamp(-1, 1)
    assert expected.std() > 0.05, "images of one colour would prove little"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.run(["image"], {"z": z.numpy()})
    assert image.shape == (batch, 3, 16, 16)
    assert np.abs(image - expected.numpy()).max() <= USUAL_ABS_DIFF
    assert 0 <= difference <= USUAL_ABS_DIFF


def test_the_file_is_self_contained_and_has_no_paths(exported: tuple[nn.Module, Path, float]) -> None:
    generator, path, _ = exported
    assert [p.name for p in path.parent.iterdir()] == ["gen.onnx"]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == IR_VERSION
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert not [t.name for t in model.graph.initializer if t.external_data]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert str(Path(export.generator.__file__).parents[1]).encode() not in path.read_bytes()
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert (entries["recipe"], entries["kimg"]) == (type(generator).__name__.removesuffix("Generator").lower(), "12")
    assert (entries["z_dim"], entries["size"], entries["precision"], entries["opset"]) == ("8", "16", "fp32", "18")
    assert entries["weights_sha256"] == weights_sha256(generator)
    assert torch.__version__ in entries["tools"]


def test_images_are_clamped(tmp_path: Path) -> None:
    export_onnx(Linear(), tmp_path / "gen.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "gen.onnx", providers=["CPUExecutionProvider"])
    (image,) = session.run(None, {"z": np.full((2, 4), 5, np.float32)})
    assert (image.min(), image.max()) == (-1, 1)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(Linear(), tmp_path / name, {"recipe": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def export_tampered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, bool], float]:
    """Exports a generator to gen.onnx, where each value of an image of the file is ``error`` above PyTorch's."""
    to_onnx = export.generator.to_graph

    def run(error: float, uint8: bool) -> float:
        def tampered(module: nn.Module, z_dim: int) -> onnx.ModelProto:
            model = to_onnx(module, z_dim)
            (bias,) = (t for t in model.graph.initializer if onnx.numpy_helper.to_array(t).ravel()[0] == BIAS)
            values = onnx.numpy_helper.to_array(bias) + np.float32(error)
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
            return model

        monkeypatch.setattr(export.generator, "to_graph", tampered)
        return export_onnx(Constant(), tmp_path / "gen.onnx", {}, uint8=uint8)

    return run


@pytest.mark.parametrize(("error", "is_warned_of"), [(0.5e-4, False), (2e-4, True), (0.9 / 255, True)])
def test_images_may_differ_by_less_than_half_a_grey_level(
    tmp_path: Path, export_tampered: Callable[[float, bool], float], capsys, error: float, is_warned_of: bool
) -> None:
    assert export_tampered(error, False) == pytest.approx(error, rel=0.01)
    assert ("warning: images of onnxruntime and PyTorch differ" in capsys.readouterr().err) is is_warned_of
    assert (tmp_path / "gen.onnx").is_file()


def test_pixels_may_differ_by_less_than_a_grey_level(
    export_tampered: Callable[[float, bool], float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a level of them is rounding."""
    assert 0 < export_tampered(0.5e-4, True) < 1 / 255
    assert capsys.readouterr().err == ""
    assert 1 / 255 < export_tampered(0.9 / 255, True) < 2 / 255
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "uint8"), [(1.1 / 255, False), (4.1 / 255, True), (0.5, False)])
def test_a_file_with_other_images_is_not_written(
    tmp_path: Path, export_tampered: Callable[[float, bool], float], error: float, uint8: bool
) -> None:
    (tmp_path / "gen.onnx").write_text("an earlier file")
    with pytest.raises(UserError, match=r"largest difference 0\.\d+, allowed is less than 0\.00.*nothing was written"):
        export_tampered(error, uint8)
    assert [p.name for p in tmp_path.iterdir()] == ["gen.onnx"]
    assert (tmp_path / "gen.onnx").read_text() == "an earlier file"


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    generator = Linear()
    generator.matrix.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="check that the weights are finite"):
        export_onnx(generator, tmp_path / "gen.onnx", {})
    assert not list(tmp_path.iterdir())


def test_an_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_onnx(Linear(), tmp_path / "file" / "gen.onnx", {})


def test_metadata_leaves_out_unknown_values() -> None:
    info = {"recipe": "r3gan-64", "kimg": 1024.0, "metric": {"name": "fid2k", "value": 12.5, "seed": 0}, "run_id": None}
    assert metadata(info) == {"recipe": "r3gan-64", "kimg": "1024", "metric": "fid2k", "metric_value": "12.5"}
    assert metadata({"recipe": "x", "kimg": 0.5, "metric": None}) == {"recipe": "x", "kimg": "0.5"}


def test_weights_sha256_depends_on_values_names_and_types() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_sha256(a) == weights_sha256(b)
    assert weights_sha256(b.double()) != weights_sha256(a)
    a.bias.data[0] += 1e-6
    b = nn.Linear(2, 2)
    assert weights_sha256(a) != weights_sha256(b)


@pytest.mark.slow
def test_exporting_prints_nothing(tmp_path: Path) -> None:
    """In a new process, because the exporter prints most at its first use."""
    program = (
        "import sys; from pathlib import Path; from export.generator import export_onnx;"
        "from trainer.config import ModelConfig; from trainer.models import build_generator;"
        "export_onnx(build_generator(ModelConfig(size=8, z_dim=4, g_width=4)), Path(sys.argv[1]), {})"
    )
    root = Path(export.generator.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "gen.onnx")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
