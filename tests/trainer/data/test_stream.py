"""Reading shards: each picture exactly once for evaluation, endless and reproducible for training."""

import gc
import io
import itertools
import pickle
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from catgan.command import UserError
from tests.trainer.damage import damage
from trainer.data.build.shards import write_shards
from trainer.data.decoded import decoded_pictures
from trainer.data.fetch import pictures
from trainer.data.manifest import Manifest, Shard, Split
from trainer.data.stream import Reader, Sample, eval_images, share, train_batches

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
    with pytest.raises(UserError, match=rf"{shards[0].name}: 1 \(pictures are missing\)"):
        list(eval_images(lying, "val"))


def stream(manifest: Manifest, *, rank=0, nimg=0, seed=0, readers=0, batch=4, per_segment=6, memory=0):
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
        memory=memory,
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


def test_batches_are_pictures_as_written(manifest: Manifest):
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
def test_training_never_ends_for_any_shape(
    manifest: Manifest, shards: int, rank: int, batch: int, per_segment: int, segments: int
):
    """Few shards, more ranks than shards, batches larger than the set: always full batches, always the same ones."""
    few = replace(manifest, splits={"train": Split(manifest.splits["train"].shards[:shards])})
    nimg = segments * batch * per_segment
    options = {"rank": rank, "batch": batch, "per_segment": per_segment, "nimg": nimg}
    seen = take(stream(few, **options), 2 * per_segment)
    assert len(seen) == 2 * per_segment * batch
    assert set(seen) <= set(numbers(eval_images(few, "train")))
    assert take(stream(few, **options), 2 * per_segment) == seen


# Damage.


@pytest.fixture
def copy(manifest: Manifest, tmp_path: Path) -> Manifest:
    return replace(Manifest.load(shutil.copytree(manifest.root, tmp_path / "copy")), max_broken=0.5)


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_broken_samples_are_passed_over_and_counted_by_shard(copy: Manifest, readers: int, memory: int):
    whole = numbers(eval_images(copy, "train"))
    names = [damage(copy, 2), damage(copy, 5)]
    left = numbers(eval_images(copy, "train"))
    assert len(left) == len(whole) - 2
    assert set(left) < set(whole)
    batches = stream(copy, readers=readers, memory=memory)
    assert set(take(batches, 100)) == set(left)
    assert batches.broken == dict.fromkeys(names, 1)


def test_a_shard_that_breaks_off_loses_the_rest_of_it_only(copy: Manifest):
    whole = numbers(eval_images(copy, "train"))
    shard = copy.splits["train"].shards[0]
    path = Path(copy.root, shard.name)
    with tarfile.open(path) as tar:
        second = [info for info in tar if info.name.endswith(".webp")][1]
    path.write_bytes(path.read_bytes()[: second.offset + 100])
    assert numbers(eval_images(copy, "train")) == [whole[0], *whole[shard.images :]]
    Path(copy.root, shard.name).unlink()
    assert numbers(eval_images(copy, "train")) == whole[shard.images :]


def test_what_is_lost_does_not_change_the_order_of_the_rest(copy: Manifest):
    """Neither with memory, nor when another reader already has the pictures of the damaged shard."""
    shard = copy.splits["train"].shards[4]
    path = Path(copy.root, shard.name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    without = take(stream(copy), 60)
    assert take(stream(copy, memory=1 << 20), 60) == without


def test_an_outage_of_one_reader_loses_nothing_for_others_and_ends(copy: Manifest):
    shard = copy.splits["train"].shards[0]
    path = Path(copy.root, shard.name)
    memory = decoded_pictures(copy, 1 << 20)
    reader, other = Reader(copy, "train", memory), Reader(copy, "train", memory)
    away = path.rename(path.with_suffix(".away"))
    assert [reader.decode(s) for s in reader.samples([shard])] == [None] * shard.images
    assert reader.counts() == {shard.name: shard.images}
    away.rename(path)
    for each in (other, reader):
        assert all(each.decode(s) is not None for s in each.samples([shard]))
    fresh = Reader(copy, "train")
    path.rename(away)
    assert [fresh.decode(s) for s in fresh.samples([shard])] == [None] * shard.images
    away.rename(path)
    assert all(fresh.decode(s) is not None for s in fresh.samples([shard]))
    assert fresh.counts() == {}


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_more_than_the_share_is_an_error_that_names_the_shards(copy: Manifest, readers: int, memory: int):
    names = [damage(copy, 2), damage(copy, 5)]
    strict = replace(copy, max_broken=1.5 / 42)
    with pytest.raises(UserError, match=rf"^2 of 42 train pictures.*{names[0]}: 1 .*{names[1]}: 1 ") as caught:
        list(eval_images(strict, "train"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^2 of 42 train pictures"):
        take(stream(strict, readers=readers, memory=memory), 100)


def test_a_wrong_size_is_judged_by_the_header_and_other_files_are_not_read(tmp_path: Path):
    """No decoder but ours: nothing is unpickled, and no memory is taken for what claims to be large."""
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    reader = Reader(
        Manifest("", SIZE, {"train": Split((Shard("x.tar", 10, "", 0),))}, 0, (), {}, "", max_broken=0.9), "train"
    )
    assert reader.decode(Sample(3, bomb.getvalue())) is None
    assert "9000x9000" in reader.reasons["x.tar"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        tar.add(tmp_path / "a.pkl", "a.pkl")
    assert list(pictures((tmp_path / "x.tar").read_bytes())) == []


# Decoded pictures in memory.


@pytest.mark.parametrize("readers", [0, 2])
def test_memory_changes_nothing_but_the_work(manifest: Manifest, readers: int, monkeypatch: pytest.MonkeyPatch):
    expected = take(stream(manifest, readers=readers), 60)
    remembering = stream(manifest, readers=readers, memory=1 << 20)
    assert take(remembering, 60) == expected
    if readers == 0:

        def fail(*_):
            raise AssertionError("read or decoded again")

        monkeypatch.setattr("trainer.data.stream._decode", fail)
        monkeypatch.setattr("trainer.data.fetch.shard_bytes", fail)
        assert take(remembering, 60) == take(stream(manifest, memory=1 << 20, nimg=10 * 24), 60)


def test_readers_and_ranks_find_each_others_pictures(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    first = stream(manifest, readers=2, memory=1 << 20)
    take(first, 60)
    monkeypatch.setattr("trainer.data.stream._decode", None)
    assert len(take(stream(manifest, rank=1, memory=1 << 20), 60)) == 240


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("catgan-*")}


def test_shared_memory_is_left_when_nobody_uses_it(manifest: Manifest):
    before = shared_files()
    one, two = stream(manifest, memory=1 << 20), stream(manifest, rank=1, memory=1 << 20)
    take(one, 1), take(two, 1)
    assert len(shared_files() - before) == 1
    del one
    gc.collect()
    assert len(shared_files() - before) == 1
    del two
    gc.collect()
    assert shared_files() <= before


def test_what_a_killed_training_left_is_used_by_its_successor_and_removed_by_others(manifest: Manifest, copy: Manifest):
    left = decoded_pictures(manifest, 1 << 20)
    assert left is not None
    for number in range(left.images):
        left.put(number, np.full((3, SIZE, SIZE), 7, np.uint8))
    path = left.path
    kept = path.read_bytes()
    del left
    gc.collect()
    assert not path.exists()
    path.write_bytes(kept)  # as after kill -9
    path.chmod(0o600)
    successor = decoded_pictures(manifest, 1 << 20)
    assert successor is not None
    assert successor.is_known(range(successor.images))
    assert (successor.get(0) == 7).all()
    del successor
    gc.collect()
    path.write_bytes(kept)
    path.chmod(0o600)
    other = replace(copy, size=8)  # another digest
    assert decoded_pictures(other, 1 << 20) is not None
    assert not path.exists()


def test_sets_that_do_not_fit_are_decoded_each_time(manifest: Manifest, capfd: pytest.CaptureFixture[str]):
    assert decoded_pictures(manifest, 42 * (1 + 3 * SIZE * SIZE) - 1) is None
    assert capfd.readouterr().err == ""
    huge = replace(manifest, splits={"train": Split((Shard("x.tar", 1 << 40, "", 0),))})
    assert decoded_pictures(huge, 1 << 60) is None  # more than the machine has: said, not killed by SIGBUS later
    assert "no room for the decoded pictures" in capfd.readouterr().err


def test_a_planted_file_or_link_is_not_used(manifest: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    made = decoded_pictures(manifest, 1 << 20)
    assert made is not None
    path = made.path
    del made
    gc.collect()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    try:
        assert decoded_pictures(manifest, 1 << 20) is None
    finally:
        path.unlink()
    assert victim.read_bytes() == b"precious"


def test_decoded_pictures_travel_to_other_processes(manifest: Manifest):
    here = decoded_pictures(manifest, 1 << 20)
    assert here is not None
    there = pickle.loads(pickle.dumps(here))
    there.put(3, np.full((3, SIZE, SIZE), 9, np.uint8))
    assert (here.get(3) == 9).all()
    assert here.get(4) is None
    there.put_broken(4)
    assert here.is_broken(4)
    del there
    gc.collect()
    assert here.path.exists()
