"""The scripts at tiny sizes: what they compare is what they say, not how fast it is."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from catgan.command import UserError
from trainer.models import build_discriminator, build_generator, num_parameters
from trainer.recipes import resolve

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize("size", [32, 64])
def test_plain_networks_have_the_shape_of_the_recipes(script: Script, size: int) -> None:
    plain = script("plain_dcgan").PlainDCGAN(size, torch.device("cpu"))
    model = resolve("dcgan", size, gpu=False).model
    # The recipe's first and last convolutions have biases: 3 of the generator, width + 1 of the discriminator.
    assert num_parameters(build_generator(model)) - num_parameters(plain.generator) == 3
    assert num_parameters(build_discriminator(model)) - num_parameters(plain.discriminator) == 64 + 1
    pictures = plain.generator(torch.randn(2, 100))
    assert pictures.shape == (2, 3, size, size)
    assert pictures.abs().max() <= 1
    assert plain.discriminator(pictures).shape == (2, 1, 1, 1)


def test_plain_step_minimises_cross_entropy(script: Script) -> None:
    torch.manual_seed(0)
    plain = script("plain_dcgan").PlainDCGAN(16, torch.device("cpu"), width=8)
    with torch.no_grad():
        plain.discriminator[-1].weight.zero_()  # logits 0: each picture costs log 2, whatever it shows
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


def test_build_makes_the_same_number_of_pictures_in_every_way(script: Script) -> None:
    build = script("build")
    argv = ["--photos", "40", "60", "--size", "16", "--num", "3", "--seconds", "0.01", "--repeats", "1"]
    result = build.main(argv)
    assert [r["photo"] for r in result["results"]] == [40, 60]
    for one in result["results"]:
        speeds = one["images_per_second_per_core"]
        assert set(speeds) == {build.OURS, build.ONE_PROCESS, build.LOOP}
        assert one["ratio"] == pytest.approx(speeds[build.OURS] / speeds[build.LOOP], rel=0.2, abs=1e-3)


def test_loader_reads_with_every_way(script: Script) -> None:
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


def test_near_duplicates_compares_and_times(script: Script) -> None:
    near_duplicates = script("near_duplicates")
    argv = ["--num", "300", "--many", "400", "--seconds", "0.01", "--repeats", "1"]
    result = near_duplicates.main(argv)
    assert set(result["images_per_second"]) == {near_duplicates.OURS, near_duplicates.BRUTE}
    assert result["ratio"] > 0
    assert result["seconds"] >= 0


@pytest.mark.parametrize(
    "name",
    [
        "step",
        "loader",
        "ray_overhead",
        "race",
        "near_duplicates",
        "torchrun",
        "checkpoint",
        "first_step",
        "all_reduce",
        "page_faults",
        "scaling_model",
    ],
)
def test_unknown_options_are_named(script: Script, name: str) -> None:
    with pytest.raises(UserError, match="--frobnicate"):
        script(name).main(["--frobnicate", "1"])


@pytest.mark.slow
def test_inference_compares_the_same_pictures_and_cold_starts(script: Script) -> None:
    inference = script("inference")
    argv = ["--recipe", "dcgan-cpu-32", "--batch", "1", "3", "--seconds", "0.01", "--repeats", "1", "--no-compile"]
    result = inference.main(argv)
    assert [r["batch"] for r in result["results"]] == [1, 3]
    for one in result["results"]:
        assert set(one["images_per_second"]) == {inference.OURS, inference.EAGER}
    cold = result["cold"]
    assert result["ratio"] == min(*(r["ratio"] for r in result["results"]), cold["ratio"])
    assert 20 < cold["peak_mb"][inference.OURS] < cold["peak_mb"][inference.EAGER]


@pytest.mark.slow
def test_checkpoint_is_kept_on_disk_and_in_a_bucket(script: Script) -> None:
    result = script("checkpoint").main(["--recipe", "dcgan-cpu-32", "--batch", "2", "--repeats", "1"])
    assert [r["where"] for r in result["results"]] == ["disk", "s3"]
    assert result["share"] == max(r["share"] for r in result["results"])
    # Both networks with their moments and the average: what the saver wrote is a whole checkpoint.
    work = script("step_work").count_work("dcgan-cpu", 32)
    assert result["megabytes"] == pytest.approx(4e-6 * (4 * work.generator + 3 * work.discriminator), rel=0.05)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_ray_and_torchrun_train_the_same_loop(script: Script) -> None:
    result = script("torchrun").main(["--batch", "2", "--steps", "4", "--repeats", "1"])
    assert [r["way"] for r in result["results"]] == ["torchrun", "ray"]
    assert all(r["step_ms"] > 0 < r["cpu_ms"] for r in result["results"])
    torchrun, ray = (r["step_ms"] for r in result["results"])
    assert result["ratio"] == pytest.approx(torchrun / ray, rel=0.01)


@pytest.mark.slow
def test_weak_scaling_is_taken_between_neighbours(script: Script) -> None:
    weak_scaling = script("weak_scaling")
    result = weak_scaling.main(["--batch", "4", "--seconds", "0.1", "--repeats", "1"])
    alone, together = (result["step_ms"][kind] for kind in ("alone", "together"))
    assert result["ratio"] == pytest.approx(alone / together, rel=0.01)
    assert weak_scaling._ratios([(1, 0), (4, 0), (9, 0)], [(2, 0), (4, 0), (3, 0)]) == [0.5, 1, 3]


def test_sums_over_ranks_are_timed_in_both_ways(script: Script) -> None:
    all_reduce = script("all_reduce")
    result = all_reduce.main(["--repeats", "2"])
    gloo, shared = (result["milliseconds"][way].values() for way in ("gloo", "shared"))
    assert result["ratio"] == pytest.approx(min(g / s for g, s in zip(gloo, shared, strict=True)), rel=0.05)
    assert result["milliseconds"]["gloo"].keys() == set(all_reduce.SIZES)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set here belongs to glibc")
def test_steps_with_kept_memory_have_few_page_faults(script: Script) -> None:
    result = script("page_faults").main(["--steps", "4", "--repeats", "4"])
    assert result["faults"]["keeping"] < result["faults"]["default"]


@pytest.mark.slow
def test_first_step_has_stages_with_and_without_a_cache(script: Script) -> None:
    first_step = script("first_step")
    result = first_step.main(["--workers", "0", "--repeats", "1"])
    assert [(r["workers"], r["cached"]) for r in result["results"]] == [(0, False), (0, True)]
    for one in result["results"]:
        assert one["seconds"] == pytest.approx(sum(one[name]["seconds"] for name, *_ in first_step.STAGES), abs=0.01)
    missing, cached = (r["drawn"]["cpu_seconds"] for r in result["results"])
    assert missing > cached  # the network has judged 4,096 pictures
