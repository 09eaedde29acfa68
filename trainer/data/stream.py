"""From shards to batches: an infinite train stream, and an evaluation stream that yields each image exactly once.

The path of an image through this file: ``Reader.samples`` yields it encoded, in the order of its shard; the train
stream shuffles samples; ``Reader.decode`` decodes it; ``_TrainDataset`` stacks images to a ``Batch`` in a reader
process, and ``TrainStream`` receives that in the training process. Batches are uint8 ``[n, 3, size, size]``; they are
normalised and augmented on the device. For a conditional model each image comes with the number of its class, which is
read from the same sample; the order of the images is the same as without.

The split over ranks and readers is passed explicitly. webdataset takes it from RANK and WORLD_SIZE in the environment,
and a spawned process without them acts as rank 0.

Images that cannot be read or decoded are skipped and counted; more than the share ``manifest.max_broken`` of a split is
an error that names the shards.
"""

from __future__ import annotations

import bisect
import io
import itertools
import random
import signal
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from catgan.command import UserError, say
from catgan.dataset import Manifest, Shard
from trainer.config import LoaderConfig
from trainer.data.decoded import DecodedImages, open_decoded
from trainer.data.fetch import class_number, encoded_images, labelled_images, shards_ahead
from trainer.data.reasons import reason_of


@dataclass(frozen=True, slots=True)
class Sample:
    """An image before decoding."""

    index: int
    """Its position in the concatenated shards of the split."""
    encoded: bytes
    """The file; empty if the decoded image is in shared memory, or the file cannot be read."""
    problem: str = ""
    """Why the file cannot be read."""
    label: int = -1
    """The number of its class; -1: not read, or in shared memory."""


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """uint8 ``[3, size, size]``"""
    label: int
    """The number of its class; -1: not read."""


class Reader:
    """Reads and decodes the images of one split in one process, and counts those that are unusable.

    Args:
        decoded: shared memory with the images of the split. Images that are ready there are neither read nor decoded;
            the others are added.
        labelled: read the classes of the images too; an image without one is unusable.
    """

    def __init__(
        self, manifest: Manifest, split: str, decoded: DecodedImages | None = None, labelled: bool = False
    ) -> None:
        self.manifest, self.split, self.decoded, self.labelled = manifest, split, decoded, labelled
        self.shards = manifest.splits[split].shards
        self.ends = list(itertools.accumulate(shard.images for shard in self.shards))
        self.indices = {s: range(end - s.images, end) for s, end in zip(self.shards, self.ends, strict=True)}
        self.broken: dict[str, set[int]] = {}
        """Indices of unusable images, by shard."""
        self.reasons: dict[str, str] = {}
        """Why the first unusable image of a shard is so."""

    def samples(self, shards: Iterable[Shard]) -> Iterator[Sample]:
        """The samples of ``shards``, in order.

        A shard with all images in shared memory is not read. Unreadable images are yielded too, with their problem:
        the shuffle must put the others in the same order whether or not data is damaged.
        """
        wanted, requested = itertools.tee(shards)
        contents = shards_ahead(self.manifest, (None if self._is_decoded(shard) else shard for shard in requested))
        for shard, content in zip(wanted, contents, strict=True):
            indices = iter(self.indices[shard])
            if content == b"":
                yield from (Sample(index, b"") for index in indices)
                continue
            try:
                if isinstance(content, OSError):
                    raise content
                for sample, index in zip(self._encoded(content), indices, strict=False):
                    yield replace(sample, index=index)
                problem = "images are missing"
            except (OSError, tarfile.TarError) as error:
                problem = reason_of(error)
            yield from (Sample(index, b"", problem) for index in indices)

    def _encoded(self, shard: bytes) -> Iterator[Sample]:
        """The samples in the content of a shard, without their positions."""
        if not self.labelled:
            yield from (Sample(0, encoded) for encoded in encoded_images(shard))
            return
        for encoded, label in labelled_images(shard):
            try:
                yield Sample(0, encoded, label=class_number(label, len(self.manifest.labels)))
            except ValueError as error:
                yield Sample(0, b"", str(error))

    def decode(self, sample: Sample) -> Decoded | None:
        """The image of a sample; None if it is unusable.

        Raises:
            UserError: more images of the split are unusable than ``manifest.max_broken`` allows.
        """
        index = sample.index
        if self.decoded and (ready := self.decoded.get(index)) is not None:
            return Decoded(ready, self.decoded.label(index))
        shard = self.shards[bisect.bisect_right(self.ends, index)]
        if sample.problem or (self.decoded and self.decoded.is_broken(index)):
            self._count_broken(shard, index, sample.problem or "cannot be decoded")
            return None
        try:
            pixels = _decode(sample.encoded, self.manifest.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.decoded:
                self.decoded.put_broken(index)
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason_of(error)
            self._count_broken(shard, index, reason)
            return None
        self.broken.get(shard.name, set()).discard(index)  # it may have been unreadable before, during an outage
        if self.decoded:
            self.decoded.put(index, pixels, sample.label)
        return Decoded(pixels, sample.label)

    def num_broken(self) -> dict[str, int]:
        """Number of unusable images found so far, by shard; shards without any are left out."""
        return {name: len(indices) for name, indices in self.broken.items() if indices}

    def _is_decoded(self, shard: Shard) -> bool:
        return self.decoded is not None and self.decoded.is_complete(self.indices[shard])

    def _count_broken(self, shard: Shard, index: int, reason: str) -> None:
        self.broken.setdefault(shard.name, set()).add(index)
        self.reasons.setdefault(shard.name, reason)
        count, images = sum(map(len, self.broken.values())), self.manifest.splits[self.split].images
        if count > self.manifest.max_broken * images:
            names = "; ".join(f"{name}: {n} ({self.reasons[name]})" for name, n in self.num_broken().items())
            raise UserError(
                f"{count} of {images} {self.split} images of {self.manifest.root} are unusable, more than the share "
                f"{self.manifest.max_broken:g} that --loader.max-broken allows: {names}"
            )


def _decode(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        if image.size != (size, size):  # known from the header, before memory is allocated for the pixels
            raise ValueError(f"{image.width}x{image.height} pixels, expected {size}x{size}")
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


class Batch(NamedTuple):
    """What a reader process sends to the training process."""

    images: Tensor
    """uint8 ``[batch, 3, size, size]``"""
    labels: Tensor
    """int64 ``[batch]``, -1 where classes are not read."""
    broken: dict[str, int]
    """Unusable images that this reader has found so far, by shard."""
    error: str = ""
    """The message of a UserError that ended the reader. DataLoader would pass on the exception with the reader's
    traceback in its message."""


@dataclass(frozen=True)
class StreamPosition:
    """Where a rank is in the train stream.

    The stream consists of segments. Each has a seed of its own: what a reader yields in it is a function of
    (``seed``, ``rank``, number of the reader, ``nimg`` at the start of the segment). A resumed training therefore
    reads what an uninterrupted one reads, after repeating part of a segment at most; a shuffled WebDataset has no
    position to restore (webdataset#271).
    """

    seed: int
    rank: int
    nimg: int
    """Images that all ranks have seen."""
    batch: int
    """Images in each batch of this rank."""
    batches_per_segment: int
    """Batches of this rank in a segment."""
    images_per_segment: int
    """Images that all ranks see during a segment."""

    @property
    def segment_start(self) -> int:
        """``nimg`` at the start of the segment."""
        return self.nimg - self.nimg % self.images_per_segment

    @property
    def batches_into_segment(self) -> int:
        """Batches of this rank between the start of the segment and the position."""
        return self.nimg % self.images_per_segment * self.batches_per_segment // self.images_per_segment


class _TrainDataset(IterableDataset[Batch]):
    """The batches of each reader, from the start of the position's segment on."""

    def __init__(
        self,
        manifest: Manifest,
        decoded: DecodedImages | None,
        position: StreamPosition,
        shuffle_buffer: int,
        labelled: bool,
    ) -> None:
        self.manifest, self.decoded, self.position, self.shuffle_buffer = manifest, decoded, position, shuffle_buffer
        self.labelled = labelled

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        this, readers = (info.id, info.num_workers) if info else (0, 1)
        at = self.position
        reader = Reader(self.manifest, "train", self.decoded, self.labelled)
        try:
            for nimg in itertools.count(at.segment_start, at.images_per_segment):
                images = self._shuffled(reader, f"{at.seed}/{at.rank}/{this}/{nimg}")
                for _ in range(at.batches_per_segment // readers):
                    yield Batch(*_stack(itertools.islice(images, at.batch)), reader.num_broken())
        except UserError as error:
            yield Batch(torch.empty(0), torch.empty(0), reader.num_broken(), str(error))

    def _shuffled(self, reader: Reader, seed: str) -> Iterator[Decoded]:
        """Infinitely many images: all shards in a new random order each time, through a buffer of encoded samples."""
        # One generator for shards and one for samples: how many shards are read ahead must not change the order in the
        # buffer. Python hashes a str seed with SHA-512, so it gives the same numbers on every machine.
        shard_rng, sample_rng = random.Random(f"{seed}/shards"), random.Random(f"{seed}/samples")
        shards = itertools.chain.from_iterable(
            shard_rng.sample(reader.shards, len(reader.shards)) for _ in itertools.count()
        )
        # A buffer larger than the split would read it several times before the first image.
        buffer = min(self.shuffle_buffer, self.manifest.splits["train"].images)
        samples = shuffle(buffer, initial=buffer, rng=sample_rng)(reader.samples(shards))
        return (image for image in map(reader.decode, samples) if image is not None)


class TrainStream(Iterator[Tensor]):
    """An infinite stream of one rank's batches, uint8 ``[batch, 3, size, size]``, from a position on.

    ``next`` raises UserError when more images are unusable than ``manifest.max_broken`` allows.

    Args:
        loader: its ``workers`` is lowered to a divisor of the batches per segment, which all readers share equally.
            The number of readers and the shuffle buffer change the order of images; the memory does not.
        pin_memory: put batches into pinned memory, for copies to a GPU.
        labelled: read the classes too, see ``next_labelled``; the manifest ``is_labelled``.
    """

    def __init__(
        self,
        manifest: Manifest,
        position: StreamPosition,
        loader: LoaderConfig,
        pin_memory: bool = False,
        labelled: bool = False,
    ) -> None:
        self.broken: dict[str, int] = {}
        """Number of unusable images met so far, by shard."""
        decoded = open_decoded(manifest, loader.memory_mib << 20, labelled)
        dataset = _TrainDataset(manifest, decoded, position, loader.shuffle_buffer, labelled)
        divisors = (n for n in range(1, loader.workers + 1) if position.batches_per_segment % n == 0)
        self._batches = iter(_data_loader(dataset, max(divisors, default=0), pin_memory))
        for _ in range(position.batches_into_segment):
            next(self)

    def __next__(self) -> Tensor:
        return self.next_labelled()[0]

    def next_labelled(self) -> tuple[Tensor, Tensor]:
        """The next batch with the classes of its images, int64 ``[batch]`` (-1 unless ``labelled``)."""
        batch = next(self._batches)
        for name, count in batch.broken.items():
            self.broken[name] = max(count, self.broken.get(name, 0))
        if batch.error:
            raise UserError(batch.error)
        return batch.images, batch.labels

    def close(self) -> None:
        """End the readers. At the end of the process it is too late: while an exception's traceback refers to the
        stream, PyTorch leaves them to ``multiprocessing``, whose only SIGTERM they survive, and which waits for
        them."""
        # What DataLoader's iterator does when it is deleted; without readers there is nothing to end.
        if (shut_down := getattr(self._batches, "_shutdown_workers", None)) is not None:
            shut_down()


def _data_loader(dataset: IterableDataset[Batch], readers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=readers,
        pin_memory=pin_memory,
        prefetch_factor=4 if readers else None,
        collate_fn=_identity,
        worker_init_fn=_leave_stopping_to_the_training,
        generator=torch.Generator(),  # the default draws a seed from the global random state, which training restores
    )


def _leave_stopping_to_the_training(reader: int) -> None:
    """A terminal sends Ctrl-C, and job schedulers send SIGTERM, to all processes of a training, which needs its readers
    up to its checkpoint. A second SIGTERM ends this reader; ``TrainStream.close`` ends it without signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _identity(batch: Any) -> Any:
    return batch


def _stack(images: Iterable[Decoded]) -> tuple[Tensor, Tensor]:
    """uint8 ``[n, 3, size, size]`` and int64 ``[n]``."""
    pixels, labels = zip(*images, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def share(total: int, index: int, count: int) -> tuple[int, int]:
    """Part ``index`` of ``count`` of the range 0..total as (start, stop); the parts differ in size by at most one."""
    return total * index // count, total * (index + 1) // count


def eval_images(
    manifest: Manifest, split: str, *, rank: int = 0, world_size: int = 1, batch_size: int = 64
) -> Iterator[Tensor]:
    """The images of ``eval_batches`` alone."""
    return (images for images, _ in eval_batches(manifest, split, rank, world_size, batch_size))


def eval_batches(
    manifest: Manifest, split: str, rank: int = 0, world_size: int = 1, batch_size: int = 64, labelled: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a split, each image once and in a fixed order: uint8 ``[<=batch_size, 3, size, size]``, and
    the classes int64 ``[<=batch_size]`` (-1 unless ``labelled``).

    A share is a contiguous range of the concatenated shards; together the ranks' shares are the split. Unusable images
    are skipped, and their number is reported at the end.

    Raises:
        UserError: more images are unusable than ``manifest.max_broken`` allows.
    """
    reader = Reader(manifest, split, labelled=labelled)
    start, stop = share(manifest.splits[split].images, rank, world_size)
    shards = [shard for shard, indices in reader.indices.items() if indices.start < stop and start < indices.stop]
    samples = (sample for sample in reader.samples(shards) if start <= sample.index < stop)
    images = (image for image in map(reader.decode, samples) if image is not None)
    count = 0
    while batch := list(itertools.islice(images, batch_size)):
        count += len(batch)
        yield _stack(batch)
    broken = sum(reader.num_broken().values())
    assert count + broken == stop - start, (count, broken, start, stop)
    if broken:
        say(f"{broken} unusable {split} images of {manifest.root} were skipped")
