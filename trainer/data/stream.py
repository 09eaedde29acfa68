"""Reading shards: an infinite train stream and an evaluation stream that meets each picture exactly once.

Both yield uint8 batches ``[n, 3, size, size]``; normalisation and augmentation happen on the device. The split over
ranks and reader processes is passed in explicitly instead of being guessed from the environment (webdataset reads
RANK and WORLD_SIZE there, and every spawned process without them believes it is rank 0).
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import tarfile_to_samples

from trainer.data.manifest import Manifest

_SUFFIXES = ("png", "webp")


def _decode(sample: dict[str, Any], size: int) -> Tensor:
    """The sample's picture, uint8 ``[3, size, size]``. Only lossless pictures are read, nothing is unpickled."""
    data = next((sample[s] for s in _SUFFIXES if s in sample), None)
    if data is None:
        raise ValueError(f"{sample['__key__']} in {sample.get('__url__')}: no .png or .webp in the sample")
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (size, size, 3):
        raise ValueError(f"{sample['__key__']} in {sample.get('__url__')}: {pixels.shape}, expected {size}x{size}x3")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _samples(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    return tarfile_to_samples()({"url": path} for path in paths)


def _train_samples(paths: list[str], rng: random.Random, buffer: int) -> Iterator[dict[str, Any]]:
    """Raw samples of all shards in random order, over and over; pictures are decoded after the shuffle buffer."""

    def endless() -> Iterator[str]:
        while True:
            yield from rng.sample(paths, len(paths))

    return shuffle(buffer, initial=buffer, rng=rng)(_samples(endless()))


class _TrainStream(IterableDataset[Tensor]):
    """Batches in segments: what a reader yields in the segment that starts at ``nimg`` images is a function of
    (seed, rank, reader, nimg) alone.

    A training that resumes at a segment's boundary therefore reads what an uninterrupted one reads, without replaying
    anything (webdataset#271: there is no position to restore in the middle of a stream).
    """

    def __init__(
        self, manifest: Manifest, rank: int, seed: int, batch: int, per_segment: int, starts: Iterable[int], buffer: int
    ) -> None:
        self.paths = manifest.paths("train")
        self.size = manifest.size
        self.rank, self.seed = rank, seed
        self.batch, self.per_segment, self.starts = batch, per_segment, starts
        self.buffer = buffer

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        for start in self.starts:
            # A str seed is hashed with SHA-512, hence the same on every machine.
            rng = random.Random(f"{self.seed}/{self.rank}/{reader}/{start}")
            images = (_decode(s, self.size) for s in _train_samples(self.paths, rng, self.buffer))
            for _ in range(self.per_segment // readers):
                yield torch.stack(list(itertools.islice(images, self.batch)))


def train_batches(
    manifest: Manifest,
    *,
    rank: int,
    seed: int,
    nimg: int,
    batch: int,
    batches_per_segment: int,
    images_per_segment: int,
    readers: int,
    buffer: int,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """An endless stream of this rank's batches, uint8 ``[batch, 3, size, size]``.

    Args:
        nimg: images seen by all ranks so far; a segment starts here.
        batch: pictures per batch of this rank.
        batches_per_segment: after so many batches the stream is seeded afresh by (seed, rank, nimg).
        images_per_segment: by how much ``nimg`` grows in a segment.
        readers: processes to read with; lowered to a divisor of ``batches_per_segment``. 0 reads in this process.
        buffer: samples in the shuffle buffer of each reader.
    """
    readers = max((r for r in range(1, readers + 1) if batches_per_segment % r == 0), default=0)
    starts = itertools.count(nimg, images_per_segment)
    dataset = _TrainStream(manifest, rank, seed, batch, batches_per_segment, starts, buffer)
    return iter(_loader(dataset, readers, pin_memory))


def _loader(dataset: IterableDataset[Tensor], readers: int, pin_memory: bool = False) -> DataLoader[Tensor]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=readers,
        pin_memory=pin_memory,
        prefetch_factor=4 if readers else None,
        generator=torch.Generator(),  # else a loader draws from the random state that training is resumed with
    )


def share(total: int, index: int, count: int) -> tuple[int, int]:
    """Part ``index`` of ``count`` of the range 0..total as (start, stop); the parts differ in size by at most one."""
    return total * index // count, total * (index + 1) // count


class _EvalStream(IterableDataset[Tensor]):
    def __init__(self, manifest: Manifest, split: str, rank: int, world_size: int, batch_size: int) -> None:
        self.manifest, self.split = manifest, split
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        split = self.manifest.splits[self.split]
        start, stop = share(split.images, self.rank * readers + reader, self.world_size * readers)
        images = (_decode(sample, self.manifest.size) for sample in self._range(start, stop))
        while chunk := list(itertools.islice(images, self.batch_size)):
            yield torch.stack(chunk)

    def _range(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Samples ``start`` to ``stop`` of the concatenated shards; shards outside are not opened."""
        offset = 0
        for path, shard in zip(self.manifest.paths(self.split), self.manifest.splits[self.split].shards, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, shard.images)
            if first < last:
                yield from itertools.islice(_samples([path]), first, last)
            offset += shard.images


def eval_images(
    manifest: Manifest, split: str, *, rank: int = 0, world_size: int = 1, batch_size: int = 64, readers: int = 0
) -> Iterator[Tensor]:
    """This rank's share of a split, each picture once, in a fixed order: uint8 ``[<=batch_size, 3, size, size]``.

    The ranks' shares are disjoint and together are the split, for any number of shards, ranks and reader processes:
    each takes a contiguous range of the concatenated shards.

    Raises:
        ValueError: the shards hold another number of pictures than the manifest says.
    """
    dataset = _EvalStream(manifest, split, rank, world_size, batch_size)
    expected = _count(manifest.splits[split].images, rank, world_size)
    count = 0
    for batch in _loader(dataset, readers):
        count += len(batch)
        yield batch
    if count != expected:
        raise ValueError(f"{split} shards of {manifest.root}: rank {rank} read {count} pictures, expected {expected}")


def _count(total: int, rank: int, world_size: int) -> int:
    start, stop = share(total, rank, world_size)
    return stop - start
