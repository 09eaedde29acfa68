"""The average's half-life, its ramp and what it covers."""

import copy

import pytest
import torch
from torch import nn

from trainer.ema import EMA
from trainer.models.batchnorm import BatchNorm


def filled(value: float) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for tensor in [*module.parameters(), module[1].running_mean, module[1].running_var]:
        nn.init.constant_(tensor, value)
    return module


def test_half_of_the_way_after_a_half_life():
    ema = EMA(filled(0.0), half_life=100, ramp=1.0)
    for i in range(10):
        ema.update(filled(1.0), batch=10, nimg=10_000 + 10 * i)
    for tensor in ema.module.parameters():
        assert tensor.mean().item() == pytest.approx(0.5)


def test_early_the_half_life_is_a_share_of_the_images_seen():
    ema = EMA(filled(0.0), half_life=1e9, ramp=0.05)
    ema.update(filled(1.0), batch=10, nimg=200)  # half-life 0.05 * 200 = 10 images: one batch
    assert ema.module[0].weight.item() == pytest.approx(0.5)


def test_half_life_zero_copies():
    ema = EMA(filled(0.0), half_life=0, ramp=0.05)
    ema.update(filled(3.0), batch=1, nimg=1)
    assert ema.module[0].weight.item() == 3.0


def test_the_average_is_for_use_only():
    ema = EMA(filled(1.0), half_life=10, ramp=1)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert ema.module(torch.zeros(1, 1, 2, 2)).shape == (1, 1, 2, 2)


def test_statistics_are_measured_under_the_averaged_weights():
    """Scale by w, then batch norm: the variance is that of the averaged weight, not the average of the variances."""

    def module(weight: float) -> nn.Module:
        made = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), BatchNorm(1))
        nn.init.constant_(made[0].weight, weight)
        return made

    ema = EMA(module(0.0), half_life=10, ramp=1)
    ema.update(module(4.0), batch=10, nimg=1000)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 1, 8, 8, generator=random) for _ in range(4)]
    ema.recompute_statistics(batches)
    norm = ema.module[1]
    assert norm.running_var.item() == pytest.approx(4.0, rel=0.05)
    expected = torch.stack([2 * b.mean() for b in batches]).mean().item()
    assert norm.running_mean.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    ema.recompute_statistics([torch.full((4, 1, 8, 8), value) for value in (-1.0, 0.0, 4.0)])
    assert norm.running_mean.item() == pytest.approx(2.0)
    assert norm.running_var.item() == pytest.approx(4 * 14 / 3), "of all latents, not within the batches alone"
    ema.recompute_statistics(batches)
    assert not norm.training
    before, random_state = copy.deepcopy(ema.module.state_dict()), torch.get_rng_state()
    norm.running_var.fill_(float("nan"))
    ema.recompute_statistics(batches)
    after = ema.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "they depend on earlier ones"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert ema.module(torch.cat(batches)).std().item() == pytest.approx(1.0, rel=0.01)
