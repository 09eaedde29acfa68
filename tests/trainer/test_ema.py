"""The average's half-life, its ramp and what it covers."""

import pytest
import torch
from torch import nn

from trainer.ema import EMA


def filled(value: float) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for tensor in [*module.parameters(), module[1].running_mean, module[1].running_var]:
        nn.init.constant_(tensor, value)
    return module


def test_half_of_the_way_after_a_half_life():
    ema = EMA(filled(0.0), half_life=100, ramp=1.0)
    for i in range(10):
        ema.update(filled(1.0), batch=10, nimg=10_000 + 10 * i)
    for tensor in [*ema.module.parameters(), ema.module[1].running_mean]:
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
