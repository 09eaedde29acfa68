"""Signs of overfitting and collapse, on discriminators and generators made to show them."""

from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import tiny
from trainer.alarms import CriticGap, warnings
from trainer.config import StopConfig
from trainer.data.shards import Manifest
from trainer.step import GAN


class Memory:
    """Takes the pictures it was shown for real, others for fakes; ``trust`` for unseen reals lies between."""

    def __init__(self, seen: list[torch.Tensor], unseen: list[torch.Tensor], trust: float) -> None:
        self.values = {}
        for batches, value in ((seen, 1.0), (unseen, trust)):
            self.values |= {image.sum().item(): value for batch in batches for image in batch}

    def judge(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8:
            return torch.zeros(len(images))
        return torch.tensor([self.values[image.sum().item()] for image in images])


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_the_gap_is_the_share_of_trust_that_unseen_pictures_lack(shards: Path, monkeypatch, trust: float):
    gap = CriticGap(Manifest.load(shards))
    gan = GAN(tiny("dcgan"), torch.device("cpu"))
    monkeypatch.setattr(gan, "judge", Memory(gap.batches["train"], gap.batches["val"], trust).judge)
    found = gap(gan)
    assert found["d/train"] == pytest.approx(1.0)
    assert found["d/val"] == pytest.approx(trust)
    assert found["d/overfitting"] == pytest.approx(1 - trust)


def test_the_real_networks_can_be_asked(shards: Path):
    gan = GAN(tiny("progan"), torch.device("cpu"))
    found = CriticGap(Manifest.load(shards))(gan)
    assert set(found) == {"d/train", "d/val", "d/overfitting"}
    assert gan.discriminator.training


def test_collapse_and_overfitting_are_told():
    (collapse,) = warnings({"diversity": 0.1}, StopConfig(min_diversity=0.2), 0.5)
    assert "mode collapse" in collapse
    (overfitted,) = warnings({"diversity": 0.9, "d/overfitting": 0.8}, StopConfig(), 0.5)
    assert "by heart" in overfitted
    assert warnings({"diversity": 0.9, "d/overfitting": 0.1}, StopConfig(), 0.5) == []
    assert warnings({"diversity": 0.1}, StopConfig(), 0.05) == [], "untrained, not collapsed"
