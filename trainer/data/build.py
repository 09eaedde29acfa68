"""Pictures, in files as people have them, made into a data set.

One process reads the sources in order and writes; the others decode, resize and encode. Every file looked at is kept,
or listed in ``rejected.csv`` with the reason.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infer.command import UserError
from trainer.data import sources
from trainer.data.folder import new_folder
from trainer.data.images import ImageError, decode, encode, pixel_digest, to_square
from trainer.data.manifest import Manifest
from trainer.data.progress import progress
from trainer.data.shards import ShardWriter
from trainer.data.workers import cores, workers


@dataclass(frozen=True)
class Options:
    """How a picture becomes a sample: see ``images.to_square``, and the least pixels of the shorter side."""

    size: int
    crop: str
    min_size: int


@dataclass(frozen=True)
class Sample:
    """A picture ready for a shard: encoded at the data set's size, with digest, width and height of the original."""

    picture: bytes
    digest: bytes
    width: int
    height: int


@dataclass
class Report:
    """What to know beside the manifest: files rejected by kind of reason, the first of them, how many were enlarged."""

    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    example: str = ""
    enlarged: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.rejected.most_common())


def build(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    size: int,
    crop: str = "center",
    val_fraction: float = 0.1,
    seed: int = 0,
    min_size: int | None = None,
    processes: int | None = None,
) -> tuple[Manifest, Report]:
    """Build the data set ``out`` from folders, zips, tars, data sets and single pictures.

    Args:
        size: side of the pictures in the data set, in pixels.
        crop: ``"center"`` or ``"none"``, see ``images.to_square``.
        val_fraction: share of the pictures kept for validation, 0 to 1.
        seed: of the order in the shards and the choice of the validation pictures.
        min_size: pictures whose shorter side has fewer pixels are rejected; None is half of ``size``, rounded up.
        processes: to decode with; None is one for each core, 0 decodes in this one.

    Raises:
        UserError: a source cannot be read at all, no picture is usable, or ``out`` is taken. Nothing is left behind.
    """
    checked = [sources.check(path) for path in paths]
    options = Options(size, crop, -(-size // 2) if min_size is None else min_size)
    with new_folder(out) as folder:
        writer = ShardWriter(folder, size)
        report = _fill(writer, checked, options, cores() if processes is None else processes)
        if not len(writer):
            why = f"{report}, beginning with {report.example}" if report.rejected else "no file to look at"
            raise UserError(f"no usable picture in {', '.join(map(str, paths))}: {why}")
        writer.finish(
            seed=seed,
            val_fraction=val_fraction,
            source=[path.resolve().name for path in checked],
            options={**asdict(options), "val_fraction": val_fraction},
        )
    return Manifest.load(out), report


def _fill(writer: ShardWriter, paths: list[Path], options: Options, processes: int) -> Report:
    """Add every usable picture once, and write ``rejected.csv``."""
    report = Report()
    names: dict[bytes, str] = {}
    # Names of files need not be UTF-8; what is not is written escaped.
    path = writer.folder / "rejected.csv"
    with (
        path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.closing(_samples(paths, options, processes)) as samples,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "reason"))
        for name, result in progress(samples, "read", "picture", _count(paths)):
            if isinstance(result, Sample) and result.digest in names:
                result = f"duplicate: the same pixels as {names[result.digest]}"
            if isinstance(result, str):
                table.writerow((name, result))
                report.rejected[result.partition(":")[0]] += 1
                report.example = report.example or f"{name} ({result})"
                continue
            names[result.digest] = name
            report.enlarged += min(result.width, result.height) < options.size
            record = {"source": name, "width": result.width, "height": result.height}
            writer.add(result.picture, result.digest, record)
    return report


def _count(paths: list[Path]) -> int | None:
    """How many files there are to look at, if that is known."""
    counts = [sources.count(path) for path in paths]
    return None if None in counts else sum(filter(None, counts))


def _samples(paths: list[Path], options: Options, processes: int) -> Generator[tuple[str, Sample | str]]:
    """Every file's name with its sample, or with the reason why there is none, in the order of the sources."""
    if not processes:
        for names, contents in _chunks(paths):
            yield from zip(names, _prepare(contents, options), strict=True)
        return
    with workers(processes, __name__) as pool:
        chunks = _chunks(paths)
        running: collections.deque[tuple[list[str], Future[list[Sample | str]]]] = collections.deque()
        try:
            while True:
                for names, contents in itertools.islice(chunks, 3 * processes - len(running)):
                    running.append((names, pool.submit(_prepare, contents, options)))
                if not running:
                    return
                names, future = running.popleft()
                yield from zip(names, future.result(), strict=True)
        except BrokenProcessPool:
            raise UserError("a decoding process was killed, perhaps for want of memory: try --processes 1") from None


_Chunk = tuple[list[str], list[bytes | str]]
"""Names, and for each the file's content or the reason why it has none."""


def _chunks(paths: list[Path]) -> Iterator[_Chunk]:
    """Enough small files to be worth a message between processes, few enough large ones to bound the memory."""
    names: list[str] = []
    contents: list[bytes | str] = []
    size = 0
    for member in itertools.chain.from_iterable(map(sources.members, paths)):
        names.append(member.name)
        try:
            contents.append(member.read())
        except ImageError as error:
            contents.append(str(error))
        size += len(contents[-1])
        if len(names) == 32 or size >= 1 << 20:
            yield names, contents
            names, contents, size = [], [], 0
    yield names, contents


def _prepare(contents: list[bytes | str], options: Options) -> list[Sample | str]:
    return [content if isinstance(content, str) else _sample(content, options) for content in contents]


def _sample(content: bytes, options: Options) -> Sample | str:
    try:
        image = decode(content)
        if min(image.size) < options.min_size:
            return f"too small: {image.width}x{image.height}, the shorter side needs {options.min_size}"
        square = to_square(image, options.size, options.crop)
    except ImageError as error:
        return str(error)
    return Sample(encode(square), pixel_digest(image), image.width, image.height)
