"""Overfitting and collapse are measured and reported."""

from pathlib import Path

import pytest
import torch

from catgan.dataset import Manifest
from tests.trainer.tiny import tiny
from trainer.recipes import FAMILIES
from trainer.step import GAN
from trainer.tracking.alarms import OverfittingCheck, warnings


class Memory:
    """A discriminator that has memorised images: logit 1 for these, ``unseen_logit`` for other reals."""

    def __init__(self, seen: list[torch.Tensor], unseen: list[torch.Tensor], unseen_logit: float) -> None:
        self.values = {}
        for batches, value in ((seen, 1.0), (unseen, unseen_logit)):
            self.values |= {image.sum().item(): value for batch in batches for image in batch}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.values[image.sum().item()] for image in images])


@pytest.mark.parametrize("unseen_logit", [0.0, 0.5, 1.0])
def test_overfitting_is_the_gap_between_seen_and_unseen_reals(shards: Path, monkeypatch, unseen_logit: float):
    check = OverfittingCheck(Manifest.load(shards))
    gan = GAN(tiny("dcgan"), torch.device("cpu"))
    monkeypatch.setattr(gan, "fake_logits", lambda z: torch.zeros(len(z)))
    monkeypatch.setattr(gan, "logits", Memory(check.batches["train"], check.batches["val"], unseen_logit).logits)
    found = check(gan)
    assert found["d/train"] == pytest.approx(1.0)
    assert found["d/val"] == pytest.approx(unseen_logit)
    assert found["d/overfitting"] == pytest.approx(1 - unseen_logit)


def test_an_untrained_discriminator_has_no_overfitting_metric(shards: Path, monkeypatch):
    check = OverfittingCheck(Manifest.load(shards))
    gan = GAN(tiny("dcgan"), torch.device("cpu"))
    monkeypatch.setattr(gan, "logits", lambda images: -torch.ones(len(images)))
    monkeypatch.setattr(gan, "fake_logits", lambda z: torch.zeros(len(z)))
    assert check(gan) == {"d/train": -1.0, "d/val": -1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_works_with_the_networks_of_each_recipe(family: str, shards: Path):
    gan = GAN(tiny(family), torch.device("cpu"))
    check = OverfittingCheck(Manifest.load(shards))
    assert len({len(batch) for batches in check.batches.values() for batch in batches[:1]}) == 1
    assert {"d/train", "d/val"} <= set(check(gan))
    assert gan.discriminator.training
    assert gan.generator.training


def test_collapse_and_overfitting_give_warnings():
    config = tiny("dcgan")
    (collapse,) = warnings({"diversity": 0.1}, config, 15_000)
    assert "mode collapse" in collapse
    overfitted = {"diversity": 0.9, "d/overfitting": 0.8}
    (warning,) = warnings(overfitted, config, 15_000)
    assert "overfits" in warning
    assert "--augment.target" in warning
    (warning,) = warnings(overfitted, tiny("r3gan"), 15_000)
    assert "--augment.target" not in warning, "ADA cannot steer by its loss"
    assert warnings({"diversity": 0.9, "d/overfitting": 0.1}, config, 15_000) == []
    losing = {"diversity": 0.9, "loss/discriminator": 0.35}
    large = tiny("dcgan", 64)
    (warning,) = warnings(losing, large, 15_000)
    assert "the discriminator wins" in warning
    assert warnings(losing | {"loss/discriminator": 0.9}, large, 15_000) == []
    assert warnings(losing, config, 15_000) == [], "at 32x32 good trainings have such a loss, too"
    assert warnings(losing, tiny("ralsgan", 64), 15_000) == [], "its losses have another scale"
    assert warnings({"diversity": 0.1, "d/overfitting": 0.8}, config, 10) == [], "untrained"
