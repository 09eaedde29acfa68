"""The scripts at tiny sizes: what they compare is what they say, not how fast it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from infer.command import UserError
from trainer.data.shards import write_shards
from trainer.data.synth import draw_many
from trainer.models import build_discriminator, build_generator, num_parameters
from trainer.recipes import dcgan

Script = Callable[[str], ModuleType]


class Clock(Protocol):
    now: float


@pytest.mark.parametrize("size", [32, 64])
def test_plain_networks_have_the_shape_of_the_recipes(script: Script, size: int) -> None:
    plain = script("plain_dcgan").PlainDCGAN(size, torch.device("cpu"))
    model = dcgan(size).model
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


def test_loader_reads_with_every_way(script: Script) -> None:
    loader = script("loader")
    argv = ["--sizes", "16", "--workers", "0", "--num", "160", "--seconds", "0.01", "--repeats", "1"]
    result = loader.main(argv)
    (only,) = result["results"]
    assert set(only["images_per_second"]) == {
        loader.OURS,
        loader.FOLDER_FLOAT,
        loader.FOLDER_UINT8,
        loader.WEBDATASET,
    }
    assert result["ratio"] == min(only["ratios"].values()) > 0


def test_equal_time_counts_training_only(script: Script, clock: Clock, tmp_path: Path) -> None:
    equal_time = script("equal_time")
    generator = nn.Sequential(nn.Linear(2, 3 * 4 * 4), nn.Unflatten(1, (3, 4, 4)))
    seen: list[int] = []

    def step(nimg: int) -> None:
        seen.append(nimg)
        clock.now += 1.0

    def evaluator(generate: Callable[[Sequence[int]], Tensor]) -> dict[str, Any]:
        clock.now += 1000.0
        return {"value": float(generate(range(4)).shape[0])}

    contestant = equal_time.Contestant("tiny", generator, generator, z_dim=2, batch=8, step=step)
    result = equal_time._train(contestant, 1.0, 3, evaluator, tmp_path)
    assert seen == list(range(0, 60 * 8, 8))
    assert [point["minutes"] for point in result["curve"]] == pytest.approx([1 / 3, 2 / 3, 1], abs=0.01)
    assert result["images_per_second"] == 8.0
    assert result["kimg"] == 0.48
    assert len(list(tmp_path.glob("tiny-*.png"))) == 3


def test_equal_time_refuses_recipes_of_another_size(script: Script, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", draw_many(0, 20, 32), size=32)
    argv = ["--data", str(tmp_path / "shards"), "--recipes", "dcgan-cpu,dcgan-cpu-64", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="dcgan-cpu-64: the pictures are 32x32"):
        script("equal_time").main(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["step", "loader", "ray_overhead", "equal_time"])
def test_unknown_options_are_named(script: Script, name: str) -> None:
    with pytest.raises(UserError, match="--frobnicate"):
        script(name).main(["--frobnicate", "1"])
