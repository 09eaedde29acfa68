"""The evaluator: every image exactly once on any number of ranks, cached statistics, and the protocol in results."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from catgan.command import UserError
from catgan.dataset import Manifest, Split
from trainer.data.build.shards import write_shards
from trainer.data.stream import eval_images
from trainer.metrics.evaluate import Evaluator, metric_name, statistics_path
from trainer.metrics.frechet import Moments, frechet_distance
from trainer.metrics.intervals import frechet_error

SIZE = 16


class Toy:
    """Features: mean and standard deviation of each channel. Counts the images it was given."""

    name, dim, weights_sha256, resize = "toy", 6, "0" * 64, "none"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.num_images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        self.num_images += len(images)
        pixels = images.float().flatten(2) / 255
        return torch.cat([pixels.mean(2), pixels.std(2)], 1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rng = np.random.default_rng(0)
    images = (((rng.random((SIZE, SIZE, 3)) * rng.integers(40, 256)).astype(np.uint8), {"i": i}) for i in range(157))
    return write_shards(tmp_path_factory.mktemp("data") / "shards", images, size=SIZE, val_fraction=0.2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CATGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def generate(seeds: Sequence[int]) -> torch.Tensor:
    rows = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(s)) * (s % 200 + 55) for s in seeds]
    return torch.stack(rows).to(torch.uint8)


def prepared(manifest: Manifest, **options) -> Evaluator:
    evaluator = Evaluator(Toy(), manifest, **options)
    evaluator.prepare()
    return evaluator


def test_the_result_has_the_distance_and_the_protocol(cache: Path, manifest: Manifest):
    sides = [Moments(6), Moments(6)]
    reals = Toy()(torch.cat(list(eval_images(manifest, "train"))))
    sides[0].update(reals)
    fakes = Toy()(generate(range(7, 307)))
    sides[1].update(fakes)
    result = prepared(manifest, num_fake=300, seed=7)(generate)
    assert result.pop("seconds") >= 0
    assert result.pop("standard_error") > 0
    assert result.pop("value") == pytest.approx(frechet_distance(*(side.gaussian() for side in sides)), rel=1e-9)
    spread = fakes.double().var(0).sum() / reals.double().var(0).sum()
    assert result.pop("diversity") == pytest.approx(spread.item(), rel=1e-6)
    assert result == {
        "name": "fd300_toy",
        "n_real": manifest.splits["train"].images,
        "n_fake": 300,
        "extractor": "toy",
        "weights_sha256": "0" * 64,
        "resize": "none",
        "seed": 7,
    }
    json.dumps(result)


def test_results_are_comparable_if_they_were_computed_in_the_same_way(manifest: Manifest):
    evaluator = Evaluator(Toy(), manifest, num_fake=2048, seed=7)
    result = {"name": "fd2k_toy", "n_fake": 2048, "weights_sha256": "0" * 64, "resize": "none", "seed": 7}
    assert evaluator.name == result["name"]
    assert evaluator.is_comparable(result)
    for change in (
        {"n_fake": 2999},
        {"n_fake": None},
        {"name": "fd2k_other"},
        {"weights_sha256": "1" * 64},
        {"seed": 8},
    ):
        assert not evaluator.is_comparable(result | change), change
    assert Evaluator(Toy(), manifest, num_fake=2999).name == result["name"], "the name does not tell"


def test_the_distance_of_real_images_is_zero(cache: Path, manifest: Manifest):
    reals = torch.cat(list(eval_images(manifest, "train")))
    evaluator = prepared(manifest, num_fake=len(reals))
    assert evaluator(lambda seeds: reals[list(seeds)])["value"] < 1e-6
    assert evaluator(lambda seeds: 255 - reals[list(seeds)])["value"] > 0.01


def test_each_seed_is_generated_once_in_batches(cache: Path, manifest: Manifest):
    generated: list[list[int]] = []

    def record(seeds: Sequence[int]) -> torch.Tensor:
        generated.append(list(seeds))
        return generate(seeds)

    prepared(manifest, num_fake=150, seed=3)(record)
    assert [seed for batch in generated for seed in batch] == list(range(3, 153))
    assert max(map(len, generated)) <= 64


def test_the_standard_error_is_computed_for_values_below_a_limit(cache: Path, manifest: Manifest):
    evaluator = prepared(manifest, num_fake=150, seed=3)
    result = evaluator(generate)
    assert evaluator.real is not None
    assert result["standard_error"] == frechet_error(evaluator.real, Toy()(generate(range(3, 153))))
    assert evaluator(generate, result["value"] + 1e-6)["standard_error"] == result["standard_error"]
    assert "standard_error" not in evaluator(generate, result["value"])
    assert "standard_error" not in prepared(manifest, num_fake=19)(generate)


def test_real_images_are_read_once(cache: Path, manifest: Manifest):
    first, second = Evaluator(Toy(), manifest, 20), Evaluator(Toy(), manifest, 20)
    first.prepare()
    first.prepare()
    assert first.extractor.num_images == manifest.splits["train"].images
    second.prepare()
    assert second.extractor.num_images == 0
    a, b = first(generate), second(generate)
    assert a | {"seconds": 0} == b | {"seconds": 0}


def test_a_damaged_or_full_cache_only_costs_time(
    cache: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    value = prepared(manifest, num_fake=20)(generate)["value"]
    (path,) = cache.glob("real-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert prepared(manifest, num_fake=20)(generate)["value"] == value
    assert "computing the statistics again" in capsys.readouterr().err
    path.unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert prepared(manifest, num_fake=20)(generate)["value"] == value
    assert "No space left on device" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("change", [{"weights_sha256": "1" * 64}, {"resize": "other"}, {"name": "toy2"}])
def test_statistics_of_another_network_are_not_used(cache: Path, manifest: Manifest, change: dict[str, str]):
    prepared(manifest, num_fake=20)
    other = Toy()
    vars(other).update(change)
    Evaluator(other, manifest, 20).prepare()
    assert other.num_images == manifest.splits["train"].images


def test_statistics_of_another_split_are_not_used(cache: Path, manifest: Manifest):
    prepared(manifest, num_fake=20)
    evaluator = prepared(manifest, num_fake=20, split="val")
    assert evaluator.extractor.num_images == manifest.splits["val"].images
    assert evaluator(generate)["n_real"] == manifest.splits["val"].images


def test_the_names_of_cached_statistics_are_fixed(cache: Path):
    """Statistics that earlier versions cached are found."""
    manifest = Manifest("/data", 16, {"train": Split(()), "val": Split(())}, 0, (), {}, "")
    paths = [statistics_path(manifest, splits, Toy()) for splits in (["train"], ["train", "val"])]
    assert [path.relative_to(cache).name for path in paths] == [
        "real-9a422d836b55b070e09b94d9f9197d0d.npz",
        "real-19f4b9f0938712c42a25870aab433a6b.npz",
    ]


def test_the_random_state_does_not_depend_on_the_cache(cache: Path, manifest: Manifest):
    before = torch.get_rng_state()
    prepared(manifest, num_fake=20)(generate)
    assert torch.equal(torch.get_rng_state(), before)


def _rank(rank: int, world_size: int, port: int, manifest: Manifest, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    generated: list[int] = []

    def record(seeds: Sequence[int]) -> torch.Tensor:
        generated.extend(seeds)
        return generate(seeds)

    evaluator = prepared(manifest, num_fake=151)
    num_read = evaluator.extractor.num_images
    again = prepared(manifest, num_fake=151)
    record_of = {
        "result": evaluator(record),
        "seeds": generated,
        "num_read": num_read,
        "num_read_again": again.extractor.num_images,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(record_of))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_work_and_give_the_result_of_one_process(
    cache: Path, manifest: Manifest, tmp_path: Path, world_size: int
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (world_size, port, manifest, str(tmp_path)), world_size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert sorted(seed for rank in ranks for seed in rank["seeds"]) == list(range(151))
    assert min(len(rank["seeds"]) for rank in ranks) >= 151 // world_size
    assert sum(rank["num_read"] for rank in ranks) == manifest.splits["train"].images
    assert [rank["num_read_again"] for rank in ranks] == [0] * world_size
    assert all(rank["result"] == ranks[0]["result"] for rank in ranks)
    alone = prepared(manifest, num_fake=151)(generate)
    assert ranks[0]["result"]["value"] == pytest.approx(alone["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("metric", "extractor", "num_fake", "name"),
    [
        ("fid", "inception", 2048, "fid2k"),
        ("fid", "inception", 50_000, "fid50k"),
        ("fid", "inception", 49_999, "fid49k"),
        ("fid", "inception-1a2b3c4d", 2048, "fd2k_inception-1a2b3c4d"),
        ("fid", "efflite0", 2048, "fd2k_efflite0"),
        ("fid", "efflite0", 999, "fd999_efflite0"),
        ("kid", "inception", 5000, "kid5k"),
        ("kid", "inception", 270, "kid270"),
        ("kid", "efflite0", 1000, "kid1k_efflite0"),
    ],
)
def test_metric_names(metric: str, extractor: str, num_fake: int, name: str):
    assert metric_name(metric, extractor, num_fake) == name


def test_fid_needs_2048_images(manifest: Manifest):
    toy = Toy()
    vars(toy).update(name="inception")
    with pytest.raises(UserError, match="2,048"):
        Evaluator(toy, manifest, num_fake=2047)
    assert Evaluator(toy, manifest, num_fake=2048).name == "fid2k"


def test_an_empty_split_is_rejected(tmp_path: Path):
    images = ((np.full((SIZE, SIZE, 3), i, np.uint8), {}) for i in range(3))
    manifest = write_shards(tmp_path / "shards", images, size=SIZE, val_fraction=0)
    with pytest.raises(UserError, match="0 real"):
        Evaluator(Toy(), manifest, num_fake=20, split="val")
