"""Fixtures for tests of metric networks and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.features.networks import INCEPTION

REAL_WEIGHTS = os.environ.get("CATGAN_INCEPTION_WEIGHTS")


class TinyExtractor:
    """Average colours of a 4x4 grid as features, in place of a metric network, where the metric's value does not
    matter. A Fréchet distance of 48 dimensions takes a millisecond instead of the second that 1,280 take."""

    name, dim, weights_sha256, resize, device = "efflite0", 48, "0" * 64, "none", torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


@pytest.fixture
def tiny_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process evaluate with ``TinyExtractor``."""
    for module in ("trainer.loop", "export.evaluate"):
        monkeypatch.setattr(f"{module}.choose_extractor", lambda *_, **__: TinyExtractor())


@pytest.fixture(scope="session")
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Empty caches of this project and of torch hub, no downloads, and no weights from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("CATGAN_OFFLINE", "1")
        patch.delenv("CATGAN_INCEPTION_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="session")
def inception_weights(request: pytest.FixtureRequest) -> Path:
    """pytorch-fid's weights if CATGAN_INCEPTION_WEIGHTS names them, else random ones."""
    return Path(REAL_WEIGHTS) if REAL_WEIGHTS else request.getfixturevalue("random_inception_weights")


@pytest.fixture(scope="session")
def random_inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of InceptionV3, scaled so that activations neither vanish nor explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = INCEPTION.build()
        for parameter in network.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
