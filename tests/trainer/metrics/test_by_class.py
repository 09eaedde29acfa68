"""Distances of single classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import TinyExtractor
from tests.trainer.data.coloured import write_coloured
from trainer.metrics import by_class
from trainer.metrics.by_class import ByClass, distance
from trainer.metrics.frechet import Moments, frechet_distance


def features(n: int, seed: int, dim: int = 12) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=random) @ torch.randn(dim, dim, generator=random) + seed


@pytest.mark.parametrize(("n", "m"), [(40, 30), (30, 40), (8, 6), (2, 40)])
def test_it_is_the_frechet_distance_also_of_fewer_images_than_dimensions(n: int, m: int) -> None:
    a, b = features(n, 0), features(m, 1)
    gaussians = []
    for x in (a, b):
        moments = Moments(12)
        moments.update(x)
        gaussians.append(moments.gaussian())
    assert distance(a, b) == pytest.approx(frechet_distance(*gaussians), rel=1e-5)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-8)


def test_classes_with_enough_images_are_compared_with_their_own_reals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_class, "MIN_IMAGES", 10)
    manifest = replace(write_coloured(tmp_path / "set", val_fraction=0), labels=("blue", "gr/een", "red"))
    labels = [0] * 10 + [1] * 9 + [2] * 40
    found = ByClass(manifest, TinyExtractor(), labels)  # type: ignore[arg-type]
    assert found.names == {0: "class/blue/fd10_efflite0", 2: "class/red/fd40_efflite0"}, "green: too few generated"
    assert {i: len(reals) for i, reals in found.reals.items()} == {0: 10, 2: 30}
    fakes = torch.zeros(59, 48)
    fakes[:10], fakes[19:49], fakes[49:] = found.reals[0], found.reals[2], found.reals[2][:10]
    values = found(fakes)
    assert values["class/blue/fd10_efflite0"] == pytest.approx(0.0, abs=1e-4)
    fakes[:10] = found.reals[2][:10]
    assert found(fakes)["class/blue/fd10_efflite0"] > 1000
    assert found(fakes)["class/red/fd40_efflite0"] == values["class/red/fd40_efflite0"]
    monkeypatch.setattr(by_class, "MAX_REALS", 5)
    assert {len(reals) for reals in ByClass(manifest, TinyExtractor(), labels).reals.values()} == {5}  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_reals_are_the_same_for_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    manifest = write_coloured(tmp_path / "set", val_fraction=0)
    monkeypatch.setattr(by_class, "MAX_REALS", 8)
    whole = by_class._first_features(manifest, TinyExtractor(), "train", [2])[2]  # type: ignore[arg-type]
    assert len(whole) == 8
    monkeypatch.setattr(by_class, "world_size", lambda: ranks)
    counts: list[dict[int, int]] = []
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(by_class, "rank", lambda rank=rank: rank)
        first = by_class._first_features(manifest, TinyExtractor(), "train", [2])  # type: ignore[arg-type]
        parts.append(by_class._wanted(first, counts)[2])
        counts.append({2: len(first[2])})
    assert torch.equal(torch.cat(parts), whole), "and no more are gathered"


def test_names_are_those_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for slug in by_class._slugs(("tabby", "tuxedo, long hair", "ähnlich", "a/../b", "  ", "a.b-c d", "白", "黒")):
        assert "/" not in slug
        _validate_metric_name(f"class/{slug}/fd100_efflite0")


def test_each_class_has_a_metric_of_its_own() -> None:
    names = ("köln", "kåln", "tabby", "白", "黒", "a/b", "a_b", "_-3", "a_b-5")
    slugs = by_class._slugs(names)
    assert len(set(slugs)) == len(names)
    assert slugs[:3] == ["k_ln-0", "k_ln-1", "tabby"]
    assert slugs[4] == "_-4"
    assert slugs[6] == "a_b-6"
