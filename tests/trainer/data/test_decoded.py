"""Decoded images in shared memory: the same stream with less work, shared by readers and ranks, deleted at the end."""

import gc
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catgan.dataset import Manifest, Shard, Split
from tests.trainer.data.numbered import SIZE, stream, take
from trainer.data.decoded import num_bytes, open_decoded
from trainer.distributed import shared_memory

pytestmark = pytest.mark.slow

MIB = 1 << 20


@pytest.mark.parametrize("readers", [0, 2])
def test_memory_changes_nothing_but_the_work(manifest: Manifest, readers: int, monkeypatch: pytest.MonkeyPatch):
    expected = take(stream(manifest, readers=readers), 60)
    with_memory = stream(manifest, readers=readers, memory_mib=1)
    assert take(with_memory, 60) == expected
    if readers == 0:

        def fail(*_: object) -> None:
            raise AssertionError("read or decoded again")

        monkeypatch.setattr("trainer.data.stream._decode", fail)
        monkeypatch.setattr("trainer.data.fetch.shard_bytes", fail)
        assert take(with_memory, 60) == take(stream(manifest, memory_mib=1, nimg=10 * 24), 60)


def test_ranks_use_the_images_that_readers_of_another_rank_decoded(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    first = stream(manifest, readers=2, memory_mib=1)
    take(first, 60)
    monkeypatch.setattr("trainer.data.stream._decode", None)
    assert len(take(stream(manifest, rank=1, memory_mib=1), 60)) == 240


def shared_files() -> set[str]:
    return {path.name for path in shared_memory.FOLDER.glob(f"{shared_memory.PREFIX}*")}


def test_the_last_user_deletes_the_file(manifest: Manifest):
    before = shared_files()
    one, two = stream(manifest, memory_mib=1), stream(manifest, rank=1, memory_mib=1)
    take(one, 1), take(two, 1)
    assert len(shared_files() - before) == 1
    del one
    gc.collect()
    assert len(shared_files() - before) == 1
    del two
    gc.collect()
    assert shared_files() <= before


def test_the_file_of_a_killed_training_is_used_by_its_successor_and_deleted_by_others(
    manifest: Manifest, copy: Manifest
):
    first = open_decoded(manifest, MIB)
    assert first is not None
    for index in range(first.images):
        first.put(index, np.full((3, SIZE, SIZE), 7, np.uint8))
    path = first.path
    content = path.read_bytes()
    del first
    gc.collect()
    assert not path.exists()
    path.write_bytes(content)  # as after kill -9
    path.chmod(0o600)
    successor = open_decoded(manifest, MIB)
    assert successor is not None
    assert successor.is_complete(range(successor.images))
    assert (successor.get(0) == 7).all()
    del successor
    gc.collect()
    path.write_bytes(content)
    path.chmod(0o600)
    other = replace(copy, size=8)  # another digest
    assert open_decoded(other, MIB) is not None
    assert not path.exists()


def test_sets_that_do_not_fit_are_not_kept(manifest: Manifest, capfd: pytest.CaptureFixture[str]):
    assert open_decoded(manifest, num_bytes(42, SIZE) - 1) is None
    assert capfd.readouterr().err == ""
    huge = replace(manifest, splits={"train": Split((Shard("x.tar", 1 << 40, "", 0),))})
    assert open_decoded(huge, 1 << 60) is None  # reserved at once: no SIGBUS later
    assert "no room for them in" in capfd.readouterr().err


def test_a_planted_link_is_not_followed(manifest: Manifest, tmp_path: Path):
    first = open_decoded(manifest, MIB)
    assert first is not None
    path = first.path
    del first
    gc.collect()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    try:
        assert open_decoded(manifest, MIB) is None
    finally:
        path.unlink()
    assert victim.read_bytes() == b"precious"


def test_a_pickled_copy_uses_the_same_memory(manifest: Manifest):
    original = open_decoded(manifest, MIB)
    assert original is not None
    copy = pickle.loads(pickle.dumps(original))
    copy.put(3, np.full((3, SIZE, SIZE), 9, np.uint8))
    assert (original.get(3) == 9).all()
    assert original.get(4) is None
    copy.put_broken(4)
    assert original.is_broken(4)
    del copy
    gc.collect()
    assert original.path.exists()
