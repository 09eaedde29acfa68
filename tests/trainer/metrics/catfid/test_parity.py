"""Parity with torch-fidelity on the same images and weights.

The real weights are a download; random ones of the same shapes take the same path. Features and metrics of given
features are compared separately: the distances of a random network's features are small differences of large numbers,
which depend on the last digits of the features.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.utils import create_feature_extractor

from trainer.features.extractors import NetworkExtractor
from trainer.features.networks import INCEPTION
from trainer.metrics.catfid.manifold import precision_recall
from trainer.metrics.catfid.scores import inception_score
from trainer.metrics.frechet import Moments, frechet_distance
from trainer.metrics.kernel import kernel_distance

NUM, DIM = 120, 24


def random_images(num: int) -> torch.Tensor:
    """Of Inception's input size, because torch-fidelity resizes differently."""
    coarse = torch.randint(0, 256, (num, 3, 13, 13), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(coarse, (299, 299), mode="bicubic").clamp(0, 255).byte()


@pytest.mark.slow
def test_features_and_logits(inception_weights: Path) -> None:
    images = random_images(6)
    # torch-fidelity uses (pixel - 128) / 128, as the first FID did; we use pytorch-fid's (pixel - 127.5) / 127.5.
    network = replace(INCEPTION, offset=128.0, scale=128.0)
    ours = NetworkExtractor(network, inception_weights, torch.device("cpu"))
    features = ours(images)
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_weights),
        verbose=False,
    )
    expected, logits = theirs(images)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(ours.logits(features), logits, rtol=0, atol=1e-4 * logits.abs().max().item())


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator)
    return (
        torch.randn(NUM, DIM, generator=generator) @ mixing,
        torch.randn(NUM - 20, DIM, generator=generator) @ mixing * 0.9 + 0.3,
    )


def test_frechet_distance(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    gaussians = []
    for side in features:
        moments = Moments(DIM)
        moments.update(side)
        gaussians.append(moments.gaussian())
    statistics = [metric_fid.fid_features_to_statistics(side) for side in features]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*gaussians) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With all features in each subset, so that the choice of subsets does not matter."""
    real, fake = features[0][: NUM - 20], features[1]
    theirs = metric_kid.kid_features_to_metric(
        fake, real, kid_subsets=2, kid_subset_size=NUM - 20, rng_seed=0, verbose=False
    )
    assert kernel_distance(real, fake)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score(features: tuple[torch.Tensor, torch.Tensor], splits: int) -> None:
    logits = features[0] / 3
    theirs = metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-9)


def test_precision_and_recall(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = features
    theirs = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=50, verbose=False)
    assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < theirs["precision"] < 1
