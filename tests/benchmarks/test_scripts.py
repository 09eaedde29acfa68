"""The scripts at tiny sizes: they compare what they say, and their ratios are those of their measurements."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from s3fs import S3FileSystem

from catgan.command import UserError
from trainer.models import build_discriminator, build_generator, num_parameters
from trainer.recipes import resolve

Script = Callable[[str], ModuleType]


def test_gpu_measures_a_recipe_against_the_plain_loop_and_other_ways(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)  # without the loader, which would draw 4,096 cats
    arguments = ["--recipes", "r3gan-cpu", "--sizes", "32", "--seconds", "0.01", "--repeats", "1", "--compiled"]
    result = gpu.main([*arguments, "--cpu", "--out", str(tmp_path)])
    (row,) = result["results"]
    assert (row["recipe"], row["batch"]) == ("r3gan-cpu-32", 16)
    assert row["images_per_second"].keys() == {"recipe", "plain", "finite"}
    assert row["seconds_per_kimg"] == pytest.approx(1000 / row["images_per_second"]["recipe"], rel=0.01)
    assert result["ratio"] == row["ratios"]["plain"]
    assert json.loads((tmp_path / "gpu-cpu.json").read_text())["results"] == result["results"]
    with pytest.raises(UserError, match="there is no CUDA GPU"):
        gpu.main(arguments)


@pytest.mark.parametrize("size", [32, 64])
def test_plain_networks_have_the_shape_of_the_recipes(script: Script, size: int) -> None:
    plain = script("plain_dcgan").PlainDCGAN(size, torch.device("cpu"))
    model = resolve("dcgan", size, gpu=False).model
    # The recipe's first and last convolutions have biases: 3 of the generator, width + 1 of the discriminator.
    assert num_parameters(build_generator(model)) - num_parameters(plain.generator) == 3
    assert num_parameters(build_discriminator(model)) - num_parameters(plain.discriminator) == 64 + 1
    images = plain.generator(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert plain.discriminator(images).shape == (2, 1, 1, 1)


def test_plain_step_minimises_cross_entropy(script: Script) -> None:
    torch.manual_seed(0)
    plain = script("plain_dcgan").PlainDCGAN(16, torch.device("cpu"), width=8)
    with torch.no_grad():
        plain.discriminator[-1].weight.zero_()  # all logits are 0, so each image costs log 2
    before = [p.clone() for p in plain.generator.parameters()]
    reals = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    loss_d, _ = plain.step(reals)
    assert loss_d == pytest.approx(2 * math.log(2))
    later = [plain.step(reals)[0] for _ in range(20)]
    assert later[-1] < loss_d
    assert any(not torch.equal(a, b) for a, b in zip(before, plain.generator.parameters(), strict=True))


def test_step_prints_a_ratio_for_each_batch(script: Script) -> None:
    argv = ["--batch", "2", "3", "--width", "4", "--seconds", "0.01", "--repeats", "1", "--precision", "fp32"]
    result = script("step").main(argv)
    assert [(r["batch"], r["bf16"]) for r in result["results"]] == [(2, False), (3, False)]
    assert result["ratio"] == min(r["ratio"] for r in result["results"]) > 0


def test_build_measures_every_way(script: Script) -> None:
    build = script("build")
    argv = ["--photos", "40", "60", "--size", "16", "--num", "3", "--seconds", "0.01", "--repeats", "1"]
    result = build.main(argv)
    assert [r["photo"] for r in result["results"]] == [40, 60]
    for one in result["results"]:
        speeds = one["images_per_second_per_core"]
        assert set(speeds) == {build.OURS, build.ONE_PROCESS, build.LOOP}
        assert one["ratio"] == pytest.approx(speeds[build.OURS] / speeds[build.LOOP], rel=0.2, abs=1e-3)


def test_loader_measures_every_way(script: Script) -> None:
    loader = script("loader")
    argv = ["--sizes", "16", "--workers", "0", "--num", "160", "--seconds", "0.01", "--repeats", "1"]
    result = loader.main(argv)
    (only,) = result["results"]
    assert set(only["images_per_second"]) == {
        loader.OURS,
        loader.DECODING,
        loader.FOLDER_FLOAT,
        loader.FOLDER_UINT8,
        loader.WEBDATASET,
    }
    assert result["ratio"] == min(v for k, v in only["ratios"].items() if k != loader.DECODING) > 0
    assert result["ratio_decoding"] > 0


def test_near_duplicates_has_ratio_and_seconds(script: Script) -> None:
    near_duplicates = script("near_duplicates")
    argv = ["--num", "300", "--many", "400", "--seconds", "0.01", "--repeats", "1"]
    result = near_duplicates.main(argv)
    assert set(result["images_per_second"]) == {near_duplicates.OURS, near_duplicates.BRUTE}
    assert result["ratio"] > 0
    assert result["seconds"] >= 0


@pytest.mark.parametrize("name", ["step", "loader", "distributed", "checkpoint", "first_step", "fid", "race", "sizes"])
def test_unknown_options_are_named(script: Script, name: str) -> None:
    with pytest.raises(UserError, match="--frobnicate"):
        script(name).main(["--frobnicate", "1"])


def test_sizes_measures_a_step_and_generating(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = script("sizes")
    monkeypatch.setattr("trainer.networks.PIXELS_PER_PASS", 2 * 32**2)
    for batch in (2, 0):
        found = sizes.work("fastgan-cpu-32", batch)
        assert found["cpu_seconds"] > 0
        assert found["mib"] >= 0


def test_sizes_takes_the_growth_between_two_batches(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = script("sizes")

    def fake(recipe: str, batch: int) -> dict[str, float]:
        size = int(recipe.rpartition("-")[2])
        return {"cpu_seconds": batch * size**2 / 1e4, "mib": 100 + batch * size if batch else size}

    monkeypatch.setattr(sizes, "_in_process", fake)
    result = sizes.main(["--recipes", "fastgan", "r3gan", "--batch", "3"])
    assert result["ratios"] == {"fastgan": pytest.approx(4, rel=0.01), "r3gan": pytest.approx(4, rel=0.01)}
    first = result["results"][0]
    assert (first["recipe"], first["batch"], first["mib_per_image"]) == ("fastgan-128", 6, 128)
    assert (first["step_mib"], first["evaluation_mib"]) == (100 + 6 * 128, 128)


@pytest.mark.soak
@pytest.mark.slow
def test_inference_measures_batches_and_cold_starts(script: Script) -> None:
    inference = script("inference")
    argv = ["--recipe", "dcgan-cpu-32", "--batch", "1", "3", "--seconds", "0.01", "--repeats", "1", "--no-compile"]
    result = inference.main(argv)
    assert [r["batch"] for r in result["results"]] == [1, 3]
    for one in result["results"]:
        assert set(one["images_per_second"]) == {inference.OURS, inference.EAGER}
    cold = result["cold"]
    assert result["ratio"] == min(*(r["ratio"] for r in result["results"]), cold["ratio"])
    assert 20 < cold["peak_mb"][inference.OURS] < cold["peak_mb"][inference.EAGER]


@pytest.mark.soak
@pytest.mark.slow
def test_checkpoint_is_saved_on_disk_and_in_a_bucket(script: Script) -> None:
    S3FileSystem.clear_instance_cache()  # one of an earlier test has the address of its server
    result = script("checkpoint").main(["--recipe", "dcgan-cpu-32", "--batch", "2", "--repeats", "1"])
    assert [r["where"] for r in result["results"]] == ["disk", "s3"]
    assert result["share"] == max(r["share"] for r in result["results"])
    # Both networks with Adam's two moments, and the EMA: a complete checkpoint was written.
    model = resolve("dcgan-cpu", 32, gpu=False).model
    generator, discriminator = num_parameters(build_generator(model)), num_parameters(build_discriminator(model))
    assert result["megabytes"] == pytest.approx(4e-6 * (4 * generator + 3 * discriminator), rel=0.05)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_distributed_trains_the_same_loop_in_three_ways(script: Script) -> None:
    distributed = script("distributed")
    result = distributed.main(["--batch", "2", "--steps", "4", "--repeats", "1"])
    speed = result["images_per_second"]
    assert tuple(speed) == distributed.WAYS
    assert result["ratio"] == pytest.approx(speed["ray"] / speed["torchrun"], rel=0.02)
    assert result["gain"] == pytest.approx(speed["torchrun"] / speed["process"], rel=0.02)
    assert result["step_ms"]["ray"] == pytest.approx(1e3 * 4 / speed["ray"], rel=0.02)


def test_distributed_takes_ratios_within_rounds(script: Script) -> None:
    assert script("distributed")._quartiles([1, 4, 9], [2, 4, 3]) == [0.5, 1, 3]


@pytest.mark.soak
@pytest.mark.slow
def test_first_step_has_stages_with_and_without_cached_statistics(script: Script) -> None:
    first_step = script("first_step")
    result = first_step.main(["--workers", "0", "--repeats", "1"])
    assert [(r["workers"], r["cached"]) for r in result["results"]] == [(0, False), (0, True)]
    for one in result["results"]:
        assert one["seconds"] == pytest.approx(sum(one[name]["seconds"] for name in first_step.STAGES), abs=0.01)
    missing, cached = (r["drawn"]["cpu_seconds"] for r in result["results"])
    assert missing > cached, "the metric network evaluated the real images"


def test_cpu_seconds_include_children(script: Script) -> None:
    program = "import os; os.fork() or [x for x in range(10**7)]; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == [b"\n", b"\n"]
        assert script("first_step")._cpu_seconds(process.pid) > 0.05
        process.kill()
