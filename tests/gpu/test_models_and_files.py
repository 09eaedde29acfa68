"""Metric networks, export and images on a GPU, and its memory when it is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import Config
from trainer.recipes import resolve
from trainer.sample import generate
from trainer.step import GAN

SEEDS = range(16)


def test_features_and_distances_are_those_of_the_cpu(gpu: torch.device) -> None:
    pytest.importorskip("torchvision")
    from trainer.features.networks import INCEPTION
    from trainer.metrics.frechet import Moments, frechet_distance

    network = INCEPTION.build()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    images = torch.randint(256, (32, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        on_cpu, on_gpu = (
            network.to(device).eval()(INCEPTION.prepare(images.to(device))) for device in (torch.device("cpu"), gpu)
        )
    assert (on_gpu.cpu() - on_cpu).norm() <= 1e-4 * on_cpu.norm()
    found = []
    for values in (on_cpu, on_gpu):
        halves = [Moments(64, values.device) for _ in range(2)]
        for moments, part in zip(halves, values[:, :64].chunk(2), strict=True):
            moments.update(part)
        found.append(frechet_distance(halves[0].gaussian(), halves[1].gaussian()))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("recipe", ["dcgan-64", "r3gan-64", "progan-64", "stylegan2-64"])
def test_the_exported_file_makes_the_images_of_the_gpu(recipe: str, gpu: torch.device, tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from export.generator import export_onnx
    from infer.latents import latents
    from infer.session import Generator

    torch.manual_seed(0)
    gan = GAN(resolve(recipe, None, gpu=True), gpu)
    gan.set_level(10_000_000)
    gan.recompute_ema_statistics()
    path = tmp_path / "gen.onnx"
    assert export_onnx(gan.ema.module, path, {}) < 1e-4
    z = latents(SEEDS, gan.generator.z_dim)
    wanted = generate(gan, SEEDS).permute(0, 2, 3, 1).cpu().numpy().astype(int)
    made = Generator(path, "cpu")(z).astype(int)
    assert abs(made - wanted).max() <= 1


def test_catinfer_on_cuda_makes_the_cpus_images(gpu: torch.device, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider: needs onnxruntime-gpu")
    pytest.importorskip("onnxscript")
    from export.generator import export_onnx
    from infer.latents import latents
    from infer.session import Generator

    torch.manual_seed(0)
    gan = GAN(resolve("dcgan-64", None, gpu=True), gpu)
    gan.recompute_ema_statistics()
    export_onnx(gan.ema.module, tmp_path / "gen.onnx", {})
    cpu, cuda = (Generator(tmp_path / "gen.onnx", device)(latents(SEEDS, 100)) for device in ("cpu", "cuda"))
    assert abs(cpu.astype(int) - cuda.astype(int)).max() <= 1


def test_a_full_gpu_is_said_in_one_line(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("webdataset", "mlflow"):
        pytest.importorskip(package)
    from catgan.command import UserError
    from trainer.distributed.context import LocalContext
    from trainer.launch import worker

    def fill(*_: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=gpu)

    monkeypatch.setattr(worker, "_work", fill)
    config: Config = resolve("r3gan-64", None, gpu=True)
    job = worker.Job(config.to_dict(), None, "run", "", "id", None)
    with pytest.raises(UserError, match=r"memory of the GPU is not enough for --batch 256 .*--accumulate 2"):
        worker.work(job, LocalContext())


def test_a_training_from_start_to_file(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("webdataset", "mlflow", "onnxscript"):
        pytest.importorskip(package)
    from tests.trainer.conftest import TinyExtractor
    from tests.trainer.test_loop import CONFIG, Notes, run
    from trainer.config import LoaderConfig
    from trainer.data.open import open_data

    monkeypatch.setattr("trainer.loop.choose_extractor", lambda *_, **__: TinyExtractor())
    outcome = run(CONFIG, open_data(None, 32, LoaderConfig()), tmp_path / "run", Notes())
    assert outcome.status == "done"
    assert (tmp_path / "run" / "best" / "gen.safetensors").is_file()
