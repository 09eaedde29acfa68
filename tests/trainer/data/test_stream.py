"""Reading shards: each picture exactly once for evaluation, endless and reproducible for training."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.manifest import Manifest, Split
from trainer.data.shards import write_shards
from trainer.data.stream import eval_images, share, train_batches

SIZE, NUM = 16, 53


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Pictures that can be told apart: the number is in the first pixel."""

    def pictures():
        for i in range(NUM):
            picture = np.full((SIZE, SIZE, 3), 128, np.uint8)
            picture[0, 0] = (i, 0, 0)
            yield picture, {"i": i}

    return write_shards(tmp_path_factory.mktemp("data") / "shards", pictures(), size=SIZE, val_fraction=0.2)


def numbers(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0, 0, 0]]


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_are_a_partition(total: int, count: int):
    parts = [share(total, i, count) for i in range(count)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=40)
@given(world_size=st.integers(1, 60), batch_size=st.integers(1, 64), split=st.sampled_from(["train", "val"]))
def test_evaluation_meets_each_picture_once(manifest: Manifest, world_size: int, batch_size: int, split: str):
    seen = Counter[int]()
    for rank in range(world_size):
        seen.update(numbers(eval_images(manifest, split, rank=rank, world_size=world_size, batch_size=batch_size)))
    assert sum(seen.values()) == len(seen) == manifest.splits[split].images


@pytest.mark.parametrize("readers", [1, 3])
def test_evaluation_meets_each_picture_once_with_reader_processes(manifest: Manifest, readers: int):
    seen = [
        n
        for rank in range(2)
        for n in numbers(eval_images(manifest, "train", rank=rank, world_size=2, batch_size=7, readers=readers))
    ]
    assert len(seen) == len(set(seen)) == manifest.splits["train"].images


def test_shards_that_hold_less_than_the_manifest_says_are_noticed(manifest: Manifest):
    shards = manifest.splits["val"].shards
    lying = replace(manifest, splits={"val": Split((replace(shards[0], images=99), *shards[1:]))})
    with pytest.raises(ValueError, match="expected"):
        list(eval_images(lying, "val"))


def stream(manifest: Manifest, *, rank=0, nimg=0, seed=0, readers=0, batch=4, per_segment=6):
    return train_batches(
        manifest,
        rank=rank,
        seed=seed,
        nimg=nimg,
        batch=batch,
        batches_per_segment=per_segment,
        images_per_segment=batch * per_segment,
        readers=readers,
        buffer=20,
    )


def take(batches, count: int) -> list[int]:
    return numbers(itertools.islice(batches, count))


def test_training_never_ends_and_covers_the_set(manifest: Manifest):
    seen = Counter(take(stream(manifest), 200))
    assert set(seen) <= set(numbers(eval_images(manifest, "train")))
    assert len(seen) == manifest.splits["train"].images


@pytest.mark.parametrize("readers", [0, 2])
def test_a_restart_at_a_segment_reads_what_an_uninterrupted_stream_reads(manifest: Manifest, readers: int):
    whole = take(stream(manifest, readers=readers), 18)
    assert take(stream(manifest, readers=readers, nimg=24), 12) == whole[24:]
    assert whole[:24] != whole[24:48]


def test_order_differs_by_rank_and_seed_and_is_the_same_for_the_same(manifest: Manifest):
    orders = [take(stream(manifest, rank=r, seed=s), 6) for r, s in [(0, 0), (1, 0), (0, 1)]]
    assert len({tuple(o) for o in orders}) == 3
    assert take(stream(manifest), 6) == orders[0]


def test_readers_that_do_not_divide_the_segment_are_lowered(manifest: Manifest):
    whole = take(stream(manifest, readers=4, per_segment=6), 12)  # 3 readers
    assert take(stream(manifest, readers=4, per_segment=6, nimg=24), 6) == whole[24:48]


def test_other_files_in_a_sample_are_not_read(tmp_path: Path):
    """No decoder but ours: a sample without a lossless picture is an error, not an unpickled surprise."""
    import tarfile

    from trainer.data.stream import _decode, _samples

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        tar.add(tmp_path / "a.pkl", "a.pkl")
    (sample,) = _samples([str(tmp_path / "x.tar")])
    with pytest.raises(ValueError, match=r"no \.png or \.webp"):
        _decode(sample, SIZE)


def test_batches_are_pictures_as_written(manifest: Manifest):
    batch = next(stream(manifest))
    assert batch.dtype == torch.uint8
    assert batch.shape == (4, 3, SIZE, SIZE)
    assert (batch[:, :, 1:, 1:] == 128).all()
