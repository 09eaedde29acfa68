"""Streams: each image exactly once for evaluation; infinite and reproducible for training, whatever is damaged."""

import contextlib
import io
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catgan.command import UserError
from catgan.dataset import Manifest, Shard, Split
from tests.trainer.damage import damage
from tests.trainer.data.numbered import SIZE, numbers, stream, take
from trainer.data.decoded import open_decoded
from trainer.data.fetch import encoded_images
from trainer.data.stream import Reader, Sample, eval_images, share


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_are_a_partition(total: int, count: int):
    parts = [share(total, i, count) for i in range(count)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=40)
@given(world_size=st.integers(1, 60), batch_size=st.integers(1, 64), split=st.sampled_from(["train", "val"]))
def test_evaluation_yields_each_image_once(manifest: Manifest, world_size: int, batch_size: int, split: str):
    seen = Counter[int]()
    for rank in range(world_size):
        seen.update(numbers(eval_images(manifest, split, rank=rank, world_size=world_size, batch_size=batch_size)))
    assert sum(seen.values()) == len(seen) == manifest.splits[split].images


def test_a_shard_with_fewer_images_than_the_manifest_says_is_an_error(manifest: Manifest):
    shards = manifest.splits["val"].shards
    wrong = replace(manifest, splits={"val": Split((replace(shards[0], images=99), *shards[1:]))})
    with pytest.raises(UserError, match=rf"{shards[0].name}: 1 \(images are missing\)"):
        list(eval_images(wrong, "val"))


def test_training_is_infinite_and_covers_the_split(manifest: Manifest):
    seen = Counter(take(stream(manifest), 200))
    assert set(seen) <= set(numbers(eval_images(manifest, "train")))
    assert len(seen) == manifest.splits["train"].images


@pytest.mark.parametrize("readers", [0, 2])
def test_a_resumed_stream_reads_what_an_uninterrupted_one_reads(manifest: Manifest, readers: int):
    whole = take(stream(manifest, readers=readers), 18)
    for nimg in (24, 32):  # at the start of a segment, and within it
        assert take(stream(manifest, readers=readers, nimg=nimg), 10) == whole[nimg : nimg + 40]
    assert whole[:24] != whole[24:48]


def test_readers_leave_ctrl_c_and_sigterm_to_the_training(manifest: Manifest):
    """A terminal and a job scheduler send them to all processes; a second SIGTERM ends a reader."""
    expected, batches = take(stream(manifest), 40), stream(manifest, readers=1)
    found = take(batches, 1)
    (reader,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(reader.pid, number)
        found += take(batches, 10)
    assert found == expected[: len(found)]
    with contextlib.suppress(RuntimeError):  # which PyTorch raises here when it learns of the reader's end
        os.kill(reader.pid, signal.SIGTERM)
        reader.join(10)
    reader.join(10)
    assert reader.exitcode == -signal.SIGTERM


def test_closing_ends_the_readers(manifest: Manifest):
    """Readers that are left while something, as a traceback, refers to the stream keep the process from ending."""
    before = set(multiprocessing.active_children())
    batches = stream(manifest, readers=2)
    take(batches, 1)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


def test_order_depends_on_rank_and_seed_alone(manifest: Manifest):
    orders = [take(stream(manifest, rank=r, seed=s), 6) for r, s in [(0, 0), (1, 0), (0, 1)]]
    assert len({tuple(o) for o in orders}) == 3
    assert take(stream(manifest), 6) == orders[0]


def test_order_is_that_of_earlier_versions(manifest: Manifest):
    """Checkpoints of earlier versions continue with the images that they would have seen."""
    assert take(stream(manifest), 3) == [29, 33, 26, 47, 30, 2, 41, 38, 12, 35, 14, 24]
    resumed = stream(manifest, seed=3, rank=1, readers=2, nimg=32, memory_mib=1)
    assert take(resumed, 3) == [38, 8, 27, 41, 6, 5, 24, 48, 52, 31, 28, 6]


def test_the_number_of_readers_is_lowered_to_a_divisor_of_the_segment(manifest: Manifest):
    whole = take(stream(manifest, readers=4, per_segment=6), 12)  # 3 readers
    assert take(stream(manifest, readers=4, per_segment=6, nimg=24), 6) == whole[24:48]


def test_batches_are_the_images_as_written(manifest: Manifest):
    batch = next(stream(manifest))
    assert batch.dtype == torch.uint8
    assert batch.shape == (4, 3, SIZE, SIZE)
    assert (batch[:, :, 1:, 1:] == 128).all()


@settings(deadline=None, max_examples=25)
@given(
    shards=st.integers(1, 7),
    rank=st.integers(0, 5),
    batch=st.integers(1, 9),
    per_segment=st.integers(1, 5),
    segments=st.integers(0, 3),
)
def test_batches_are_full_and_reproducible_for_any_shape(
    manifest: Manifest, shards: int, rank: int, batch: int, per_segment: int, segments: int
):
    """Few shards, more ranks than shards, batches larger than the split."""
    few = replace(manifest, splits={"train": Split(manifest.splits["train"].shards[:shards])})
    nimg = segments * batch * per_segment
    options = {"rank": rank, "batch": batch, "per_segment": per_segment, "nimg": nimg}
    seen = take(stream(few, **options), 2 * per_segment)
    assert len(seen) == 2 * per_segment * batch
    assert set(seen) <= set(numbers(eval_images(few, "train")))
    assert take(stream(few, **options), 2 * per_segment) == seen


# Damaged data.


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("memory_mib", [0, 1])
def test_broken_samples_are_skipped_and_counted_by_shard(copy: Manifest, readers: int, memory_mib: int):
    whole = numbers(eval_images(copy, "train"))
    names = [damage(copy, 2), damage(copy, 5)]
    left = numbers(eval_images(copy, "train"))
    assert len(left) == len(whole) - 2
    assert set(left) < set(whole)
    batches = stream(copy, readers=readers, memory_mib=memory_mib)
    assert set(take(batches, 100)) == set(left)
    assert batches.broken == dict.fromkeys(names, 1)


def test_a_truncated_shard_loses_only_what_is_missing(copy: Manifest):
    whole = numbers(eval_images(copy, "train"))
    shard = copy.splits["train"].shards[0]
    path = Path(copy.root, shard.name)
    with tarfile.open(path) as tar:
        second = [info for info in tar if info.name.endswith(".webp")][1]
    path.write_bytes(path.read_bytes()[: second.offset + 100])
    assert numbers(eval_images(copy, "train")) == [whole[0], *whole[shard.images :]]
    Path(copy.root, shard.name).unlink()
    assert numbers(eval_images(copy, "train")) == whole[shard.images :]


def test_shared_memory_does_not_change_the_order_of_damaged_data(copy: Manifest):
    shard = copy.splits["train"].shards[4]
    path = Path(copy.root, shard.name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    without = take(stream(copy), 60)
    assert take(stream(copy, memory_mib=1), 60) == without


def test_images_are_used_again_after_an_outage(copy: Manifest):
    shard = copy.splits["train"].shards[0]
    path = Path(copy.root, shard.name)
    decoded = open_decoded(copy, 1 << 20)
    reader, other = Reader(copy, "train", decoded), Reader(copy, "train", decoded)
    away = path.rename(path.with_suffix(".away"))
    assert [reader.decode(s) for s in reader.samples([shard])] == [None] * shard.images
    assert reader.num_broken() == {shard.name: shard.images}
    away.rename(path)
    for each in (other, reader):
        assert all(each.decode(s) is not None for s in each.samples([shard]))
    fresh = Reader(copy, "train")
    path.rename(away)
    assert [fresh.decode(s) for s in fresh.samples([shard])] == [None] * shard.images
    away.rename(path)
    assert all(fresh.decode(s) is not None for s in fresh.samples([shard]))
    assert fresh.num_broken() == {}


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("memory_mib", [0, 1])
def test_more_than_max_broken_is_an_error_that_names_the_shards(copy: Manifest, readers: int, memory_mib: int):
    names = [damage(copy, 2), damage(copy, 5)]
    strict = replace(copy, max_broken=1.5 / 42)
    with pytest.raises(UserError, match=rf"^2 of 42 train images.*{names[0]}: 1 .*{names[1]}: 1 ") as caught:
        list(eval_images(strict, "train"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^2 of 42 train images"):
        take(stream(strict, readers=readers, memory_mib=memory_mib), 100)


def test_large_images_are_refused_by_their_header():
    """No memory is allocated for a decompression bomb."""
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    reader = Reader(
        Manifest("", SIZE, {"train": Split((Shard("x.tar", 10, "", 0),))}, 0, (), {}, "", max_broken=0.9), "train"
    )
    assert reader.decode(Sample(3, bomb.getvalue())) is None
    assert "9000x9000" in reader.reasons["x.tar"]


def test_other_files_in_a_shard_are_ignored(tmp_path: Path):
    """Unlike webdataset, which unpickles ``.pkl``."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        tar.add(tmp_path / "a.pkl", "a.pkl")
    assert list(encoded_images((tmp_path / "x.tar").read_bytes())) == []
