"""Reading shards: an infinite train stream and an evaluation stream that meets each picture exactly once.

Both yield uint8 batches ``[n, 3, size, size]``; normalisation and augmentation happen on the device. The split over
ranks and reader processes is passed in explicitly instead of being guessed from the environment (webdataset reads
RANK and WORLD_SIZE there, and every spawned process without them believes it is rank 0).

A sample that cannot be decoded, and what is missing of a shard that cannot be read, is passed over and counted; when
more than the share ``manifest.max_broken`` of a split is unusable, that is an error which names the shards.
"""

from __future__ import annotations

import bisect
import io
import itertools
import random
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from catgan.command import UserError, say
from trainer.data.decoded import DecodedPictures, decoded_pictures
from trainer.data.fetch import pictures, shards_ahead
from trainer.data.manifest import Manifest, Shard


class Sample(NamedTuple):
    """A picture on its way: its number in the concatenated shards; as encoded, empty if that is not needed; and what is
    wrong with its shard."""

    number: int
    encoded: bytes
    problem: str = ""


class Batch(NamedTuple):
    """What a reader sends: pictures, how many of each shard it has found unusable so far, and what is wrong if that is
    too many (an exception of a reader process would arrive with its traceback for text)."""

    images: Tensor
    broken: dict[str, int]
    error: str = ""


class Reader:
    """Samples of one split, as one process reads them.

    Args:
        decoded: memory of all pictures of the split, to take pictures from and to put them into.
    """

    def __init__(self, manifest: Manifest, split: str, decoded: DecodedPictures | None = None) -> None:
        self.manifest, self.split, self.decoded = manifest, split, decoded
        self.shards = manifest.splits[split].shards
        self.ends = list(itertools.accumulate(shard.images for shard in self.shards))
        self.ranges = {s: range(end - s.images, end) for s, end in zip(self.shards, self.ends, strict=True)}
        self.broken: dict[str, set[int]] = {}
        self.reasons: dict[str, str] = {}

    def samples(self, shards: Iterable[Shard]) -> Iterator[Sample]:
        """The samples of some shards in order, lost ones too, so that the order does not depend on what is lost. Of a
        shard whose pictures are all in memory nothing is read."""
        wanted, asked = itertools.tee(shards)
        ahead = shards_ahead(self.manifest, (None if self._is_known(shard) else shard for shard in asked))
        for shard, content in zip(wanted, ahead, strict=True):
            numbers = iter(self.ranges[shard])
            if content == b"":
                yield from (Sample(number, b"") for number in numbers)
                continue
            try:
                if isinstance(content, OSError):
                    raise content
                for encoded, number in zip(pictures(content), numbers, strict=False):
                    yield Sample(number, encoded)
                reason = "pictures are missing"
            except (OSError, tarfile.TarError) as error:
                reason = str(error)
            yield from (Sample(number, b"", reason) for number in numbers)

    def decode(self, sample: Sample) -> np.ndarray | None:
        """The picture of a sample, uint8 ``[3, size, size]``; None if it is unusable. Nothing is unpickled.

        Raises:
            UserError: too many are.
        """
        number = sample.number
        if self.decoded and (ready := self.decoded.get(number)) is not None:
            return ready
        shard = self.shards[bisect.bisect_right(self.ends, number)]
        if sample.problem or (self.decoded and self.decoded.is_broken(number)):
            self._give_up(shard, number, sample.problem or "found to be unusable before")
            return None
        try:
            pixels = _decode(sample.encoded, self.manifest.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.decoded:
                self.decoded.put_broken(number)
            self._give_up(shard, number, "not a picture" if isinstance(error, UnidentifiedImageError) else str(error))
            return None
        self.broken.get(shard.name, set()).discard(number)  # an outage may have ended
        if self.decoded:
            self.decoded.put(number, pixels)
        return pixels

    def counts(self) -> dict[str, int]:
        return {name: len(numbers) for name, numbers in self.broken.items() if numbers}

    def _is_known(self, shard: Shard) -> bool:
        return self.decoded is not None and self.decoded.is_known(self.ranges[shard])

    def _give_up(self, shard: Shard, number: int, reason: str) -> None:
        self.broken.setdefault(shard.name, set()).add(number)
        self.reasons.setdefault(shard.name, reason)
        count, images = sum(map(len, self.broken.values())), self.manifest.splits[self.split].images
        if count > self.manifest.max_broken * images:
            names = "; ".join(f"{name}: {n} ({self.reasons[name]})" for name, n in self.counts().items())
            raise UserError(
                f"{count} of {images} {self.split} pictures of {self.manifest.root} are unusable, at most the share "
                f"{self.manifest.max_broken:g} may be (--loader.max-broken): {names}"
            )


def _decode(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        if image.size != (size, size):  # by the header, before memory is taken for the pixels
            raise ValueError(f"{image.width}x{image.height} pixels, expected {size}x{size}")
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


class _TrainStream(IterableDataset[Batch]):
    """Batches in segments: what a reader yields in the segment that starts at ``nimg`` images is a function of
    (seed, rank, reader, nimg) alone.

    A training that resumes therefore reads what an uninterrupted one reads, and replays no more than a segment
    (webdataset#271: there is no position to restore in the middle of a stream).
    """

    def __init__(
        self,
        manifest: Manifest,
        decoded: DecodedPictures | None,
        rank: int,
        seed: int,
        batch: int,
        per_segment: int,
        nimg: int,
        per_segment_images: int,
        buffer: int,
    ) -> None:
        self.manifest, self.decoded = manifest, decoded
        self.rank, self.seed = rank, seed
        self.batch, self.per_segment = batch, per_segment
        self.nimg, self.per_segment_images = nimg, per_segment_images
        self.buffer = buffer

    def __iter__(self) -> Iterator[Batch]:
        this, readers = _which_reader()
        reader = Reader(self.manifest, "train", self.decoded)
        try:
            for start in itertools.count(self.nimg, self.per_segment_images):
                images = self._images(reader, f"{self.seed}/{self.rank}/{this}/{start}")
                for _ in range(self.per_segment // readers):
                    yield Batch(_stack(itertools.islice(images, self.batch)), reader.counts())
        except UserError as error:
            yield Batch(torch.empty(0), reader.counts(), str(error))

    def _images(self, reader: Reader, seed: str) -> Iterator[np.ndarray]:
        """All shards in random order, over and over; pictures are decoded after the shuffle buffer."""
        # Two sources of chance: how far ahead shards are chosen must not change the order in the buffer. A str seed is
        # hashed with SHA-512, hence the same on every machine.
        of_shards, of_samples = random.Random(f"{seed}/shards"), random.Random(f"{seed}/samples")
        endless = itertools.chain.from_iterable(
            of_shards.sample(reader.shards, len(reader.shards)) for _ in itertools.count()
        )
        # A buffer larger than the set would read it several times over before the first picture.
        buffer = min(self.buffer, self.manifest.splits["train"].images)
        samples = shuffle(buffer, initial=buffer, rng=of_samples)(reader.samples(endless))
        return (pixels for pixels in map(reader.decode, samples) if pixels is not None)


class TrainBatches(Iterator[Tensor]):
    """An endless stream of a rank's batches, uint8 ``[batch, 3, size, size]``; see ``train_batches``.

    ``broken`` counts what was unusable so far, by shard.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.broken: dict[str, int] = {}

    def __next__(self) -> Tensor:
        batch = next(self._batches)
        for name, count in batch.broken.items():
            self.broken[name] = max(count, self.broken.get(name, 0))
        if batch.error:
            raise UserError(batch.error)
        return batch.images


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
    memory: int = 0,
    pin_memory: bool = False,
) -> TrainBatches:
    """An endless stream of this rank's batches. They raise UserError when too many samples are unusable.

    Args:
        nimg: images seen by all ranks so far. In the middle of a segment its batches up to here are read and dropped.
        batch: pictures per batch of this rank.
        batches_per_segment: after so many batches the stream is seeded afresh by (seed, rank, nimg).
        images_per_segment: by how much ``nimg`` grows in a segment.
        readers: processes to read with; lowered to a divisor of ``batches_per_segment``. 0 reads in this process.
        buffer: samples in the shuffle buffer of each reader.
        memory: bytes of memory that the decoded pictures may take; if they fit, later epochs cost no decoding. Which
            pictures come in which order does not depend on it.
    """
    readers = max((r for r in range(1, readers + 1) if batches_per_segment % r == 0), default=0)
    decoded = decoded_pictures(manifest, memory)
    start = nimg - nimg % images_per_segment
    dataset = _TrainStream(manifest, decoded, rank, seed, batch, batches_per_segment, start, images_per_segment, buffer)
    batches = TrainBatches(_loader(dataset, readers, pin_memory))
    for _ in range((nimg - start) * batches_per_segment // images_per_segment):
        next(batches)
    return batches


def _loader(dataset: IterableDataset[Batch], readers: int, pin_memory: bool = False) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=readers,
        pin_memory=pin_memory,
        prefetch_factor=4 if readers else None,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else a loader draws from the random state that training is resumed with
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _which_reader() -> tuple[int, int]:
    """The number of this reader process, and of how many."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _stack(images: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(images)))


def share(total: int, index: int, count: int) -> tuple[int, int]:
    """Part ``index`` of ``count`` of the range 0..total as (start, stop); the parts differ in size by at most one."""
    return total * index // count, total * (index + 1) // count


class _EvalStream(IterableDataset[Batch]):
    def __init__(self, manifest: Manifest, split: str, rank: int, world_size: int, batch_size: int) -> None:
        self.manifest, self.split = manifest, split
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size

    def __iter__(self) -> Iterator[Batch]:
        this, readers = _which_reader()
        reader = Reader(self.manifest, self.split)
        total = self.manifest.splits[self.split].images
        start, stop = share(total, self.rank * readers + this, self.world_size * readers)
        shards = [shard for shard, r in reader.ranges.items() if r.start < stop and start < r.stop]
        try:
            samples = (s for s in reader.samples(shards) if start <= s.number < stop)
            images = (pixels for pixels in map(reader.decode, samples) if pixels is not None)
            while chunk := list(itertools.islice(images, self.batch_size)):
                yield Batch(_stack(chunk), {})
            yield Batch(torch.empty(0), reader.counts())
        except UserError as error:
            yield Batch(torch.empty(0), {}, str(error))


def eval_images(
    manifest: Manifest, split: str, *, rank: int = 0, world_size: int = 1, batch_size: int = 64, readers: int = 0
) -> Iterator[Tensor]:
    """This rank's share of a split, each picture once, in a fixed order: uint8 ``[<=batch_size, 3, size, size]``.

    The ranks' shares are disjoint and together are the split, for any number of shards, ranks and reader processes:
    each takes a contiguous range of the concatenated shards.

    Raises:
        UserError: too many are unusable. A few are passed over, and said so at the end.
    """
    dataset = _EvalStream(manifest, split, rank, world_size, batch_size)
    count, broken = 0, 0
    for batch in _loader(dataset, readers):
        if batch.error:
            raise UserError(batch.error)
        broken += sum(batch.broken.values())
        if len(batch.images):
            count += len(batch.images)
            yield batch.images
    start, stop = share(manifest.splits[split].images, rank, world_size)
    assert count + broken == stop - start, (count, broken, start, stop)
    if broken:
        say(f"{broken} unusable {split} pictures of {manifest.root} were passed over")
