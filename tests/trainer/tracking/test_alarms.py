"""Signs of overfitting and collapse, on discriminators and generators made to show them."""

from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import tiny
from trainer.data.manifest import Manifest
from trainer.recipes import FAMILIES
from trainer.step import GAN
from trainer.tracking.alarms import CriticGap, warnings


class Memory:
    """Takes the pictures it was shown for real, others for fakes; ``trust`` for unseen reals lies between."""

    def __init__(self, seen: list[torch.Tensor], unseen: list[torch.Tensor], trust: float) -> None:
        self.values = {}
        for batches, value in ((seen, 1.0), (unseen, trust)):
            self.values |= {image.sum().item(): value for batch in batches for image in batch}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.values[image.sum().item()] for image in images])


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_the_gap_is_the_share_of_trust_that_unseen_pictures_lack(shards: Path, monkeypatch, trust: float):
    gap = CriticGap(Manifest.load(shards))
    gan = GAN(tiny("dcgan"), torch.device("cpu"))
    monkeypatch.setattr(gan, "fake_logits", lambda z: torch.zeros(len(z)))
    monkeypatch.setattr(gan, "logits", Memory(gap.batches["train"], gap.batches["val"], trust).logits)
    found = gap(gan)
    assert found["d/train"] == pytest.approx(1.0)
    assert found["d/val"] == pytest.approx(trust)
    assert found["d/overfitting"] == pytest.approx(1 - trust)


def test_a_discriminator_that_knows_nothing_is_not_asked_what_it_remembers(shards: Path, monkeypatch):
    gap = CriticGap(Manifest.load(shards))
    gan = GAN(tiny("dcgan"), torch.device("cpu"))
    monkeypatch.setattr(gan, "logits", lambda images: -torch.ones(len(images)))
    monkeypatch.setattr(gan, "fake_logits", lambda z: torch.zeros(len(z)))
    assert gap(gan) == {"d/train": -1.0, "d/val": -1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_networks_can_be_asked(family: str, shards: Path):
    gan = GAN(tiny(family), torch.device("cpu"))
    gap = CriticGap(Manifest.load(shards))
    assert len({len(batch) for batches in gap.batches.values() for batch in batches[:1]}) == 1
    assert {"d/train", "d/val"} <= set(gap(gan))
    assert gan.discriminator.training
    assert gan.generator.training


def test_collapse_and_overfitting_are_told():
    config = tiny("dcgan")
    (collapse,) = warnings({"diversity": 0.1}, config, 15_000)
    assert "mode collapse" in collapse
    overfitted = {"diversity": 0.9, "d/overfitting": 0.8}
    (warning,) = warnings(overfitted, config, 15_000)
    assert "by heart" in warning
    assert "--augment.target" in warning
    (warning,) = warnings(overfitted, tiny("r3gan"), 15_000)
    assert "--augment.target" not in warning, "its critic has no level to steer by"
    assert warnings({"diversity": 0.9, "d/overfitting": 0.1}, config, 15_000) == []
    assert warnings({"diversity": 0.1, "d/overfitting": 0.8}, config, 10) == [], "untrained"
