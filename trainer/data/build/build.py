"""Pictures, in files as people have them, made into a data set.

One process reads the sources in order and keeps the books; the others decode, judge, resize and encode. Every picture
looked at is kept, or listed in ``rejected.csv`` with the reason. All that is known is in the ``Store`` of a hidden
folder, so a build that was killed goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import itertools
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from catgan.command import say
from catgan.files import cache_dir
from catgan.location import is_url
from catgan.machine import cores
from trainer.data.build import prepare, sources, upload
from trainer.data.build.duplicates import near_duplicates
from trainer.data.build.faces import FaceFinder
from trainer.data.build.folder import Worthless, partial_folder, publish, work_folder
from trainer.data.build.labels import Labels
from trainer.data.build.prepare import KEEP, Options, Results
from trainer.data.build.progress import progress
from trainer.data.build.remote import Halted
from trainer.data.build.shards import plan, tool, write_data_set
from trainer.data.build.sheet import IMAGES, rejected_sheet
from trainer.data.build.sources import Member, Source
from trainer.data.build.store import File, Store
from trainer.data.build.workers import workers
from trainer.data.images import ImageError
from trainer.data.manifest import Manifest

REMOTE_READS = 16  # objects of a bucket that are fetched at a time


@dataclass
class Report:
    """What became of the pictures looked at.

    Attributes:
        kept: pictures in the data set.
        rejected: pictures that are not, by kind of reason.
        shards: files they are in, or would be.
        enlarged: kept pictures that were smaller than the data set's size.
        resumed: files that an earlier process had looked at already.
    """

    kept: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    shards: int = 0
    enlarged: int = 0
    resumed: int = 0

    @property
    def read(self) -> int:
        return self.kept + self.rejected.total()

    def __str__(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.rejected.most_common())


@dataclass(frozen=True)
class _Job:
    """All that decides what comes out: a build goes on from the work of another if their jobs are equal."""

    sources: list[Source]
    options: Options
    labels: Labels | None
    seed: int
    val_fraction: float

    def identity(self) -> dict[str, Any]:
        return {
            "tool": tool(),
            "sources": [[source.place, source.kind, source.version] for source in self.sources],
            "labels": self.labels and self.labels.identity,
            "seed": self.seed,
            **self.recorded(),
        }

    def recorded(self) -> dict[str, Any]:
        """The options in the manifest: those that say how pictures were chosen only where they were used."""
        options = self.options
        recorded: dict[str, Any] = {"size": options.size, "crop": options.crop, "min_size": options.min_size}
        if options.crop == "face":
            recorded["faces"] = options.faces
        if options.keep:
            recorded["keep"] = list(options.keep)
        return {**recorded, "val_fraction": self.val_fraction}


def build(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    size: int,
    crop: str = "center",
    faces: str = "best",
    keep: Iterable[str] = (),
    labels: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    min_size: int | None = None,
    processes: int | None = None,
    dry_run: bool = False,
) -> tuple[Manifest | None, Report]:
    """Build the data set ``out`` from folders, zips, tars, data sets and single pictures, here or elsewhere.

    A build that was killed or interrupted, or that the network failed, goes on when it is called again with the same
    arguments and unchanged sources; ``processes`` may differ.

    Args:
        paths: paths, or URLs, see ``sources.check``.
        out: a path, or the URL of a folder in a bucket.
        size: side of the pictures in the data set, in pixels.
        crop: ``"center"``, ``"none"`` or ``"face"``, and ``faces``: see ``prepare.Options``.
        keep: checks to switch off, of ``prepare.KEEP``.
        labels: see ``labels.Labels``; None for a data set without.
        val_fraction: share of the pictures kept for validation, 0 to 1.
        seed: of the order in the shards and the choice of the validation pictures.
        min_size: pictures whose shorter side has fewer pixels are rejected; None is half of ``size``, rounded up.
        processes: to decode with; None is one for each core, 0 decodes in this one.
        dry_run: write nothing to ``out``, nor look at it. There is no manifest then.

    Raises:
        UserError: a source cannot be read at all, no picture is usable, or ``out`` is taken. Nothing is left behind.
        Halted: something failed that may not fail again. The work is kept.
    """
    job = _Job(
        sources=[sources.check(path) for path in paths],
        options=Options(size, crop, -(-size // 2) if min_size is None else min_size, faces, tuple(sorted(set(keep)))),
        labels=None if labels is None else Labels(labels),
        seed=seed,
        val_fraction=val_fraction,
    )
    if crop == "face":
        FaceFinder().load()  # here, once, instead of in all processes that look for faces
    processes = cores() if processes is None else processes
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch), seed, pictures=False) as store:
            return None, _collect(store, job, processes)
    url = upload.check(str(out)) if is_url(out) else ""
    hidden = cache_dir() / "builds" / hashlib.sha256(url.encode()).hexdigest()[:16] if url else partial_folder(out)
    with work_folder(hidden, out) as folder:
        with Store(folder, seed) as store:
            same = store.note("job") == job.identity()
            if url:
                upload.check_vacant(url, store.uploads() if same else ())
            if not same:
                if store.note("job") is not None:
                    say(f"{folder} was left by a build with other options or sources: beginning afresh")
                store.clear()
                store.set_note("job", job.identity())
            report = _collect(store, job, processes)
            manifest = write_data_set(
                store,
                folder,
                size=size,
                seed=seed,
                val_fraction=val_fraction,
                source=[source.name for source in job.sources],
                options=job.recorded(),
            )
            _write_rejections(store, folder, report)
            if url:
                upload.upload(folder, url, store)
                return replace(manifest, root=url), report
        publish(folder, Path(out))
    return Manifest.load(out), report


def _collect(store: Store, job: _Job, processes: int) -> Report:
    """Look at every picture of the sources that the store does not know yet, then at all of them together."""
    resumed = _read(store, job, processes)
    if "near-duplicate" not in job.options.keep and not store.note("compared"):
        _drop_near_duplicates(store)
        store.set_note("compared", True)
    report = Report(len(store), store.rejected(), resumed=resumed, enlarged=store.smaller_than(job.options.size))
    if not report.kept:
        name, reason, _ = next(store.rejections(), ("", "", None))
        why = f"{report}, beginning with {name} ({reason})" if report.rejected else "no file to look at"
        raise Worthless(f"no usable picture in {', '.join(source.location for source in job.sources)}: {why}")
    report.shards = len(plan(store, job.val_fraction))
    return report


def _read(store: Store, job: _Job, processes: int) -> int:
    """Fill the store. Returns the number of files that it knew already."""
    is_read = store.note("read")
    if is_read and all(source.kind != "folder" for source in job.sources):  # whose versions are in the job
        return store.num_files()
    files = _files(job)
    try:
        resumed = _skip(files, store.files())
        if is_read:
            if (new := next(files, None)) is None:
                return resumed
            raise _ChangedError(new[0].name)
    except _ChangedError as error:
        say(f"{error} is new or has changed since the build was left: beginning afresh")
        store.clear()
        store.set_note("job", job.identity())
        files, resumed = _files(job), 0
    total = _count(job.sources)
    if resumed:
        say(f"going on after {resumed:,} files that were looked at before")
    looked_at = resumed
    with contextlib.closing(_results(files, job, processes)) as results:
        for (file, label), found in progress(results, "read", "picture", total, resumed):
            assert found, file
            store.add(file, found, label=label)
            looked_at += 1
    assert store.num_files() == looked_at, (store.num_files(), looked_at)
    store.set_note("read", True)
    return resumed


_Listed = tuple[File, Member, Source]


class _ChangedError(Exception):
    """The file, by name, that is not what the store has in its place."""


def _files(job: _Job) -> Iterator[_Listed]:
    number = itertools.count()
    for source in job.sources:
        for member in source.members():
            yield File(next(number), member.name, member.length, member.version), member, source


def _skip(files: Iterator[_Listed], known: Iterator[File]) -> int:
    """Advance ``files`` past those that are known. Returns how many these are."""
    skipped = 0
    for file in known:
        listed = next(files, None)
        if listed is None or listed[0] != file:
            raise _ChangedError(file.name)
        skipped += 1
    return skipped


def _count(listed: list[Source]) -> int | None:
    """How many files there are to look at, if that is known."""
    counts = [source.count() for source in listed]
    return None if None in counts else sum(filter(None, counts))


_Labelled = tuple[File, str | None]
_Content = tuple[_Labelled, bytes | str]
"""A file and its label, and its content or the reason why it has none."""


def _results(files: Iterator[_Listed], job: _Job, processes: int) -> Generator[tuple[_Labelled, Results]]:
    """What comes of each file, in order."""
    # Faces take half a second each: what is under way when a build is stopped should not be much.
    chunks = _chunks(_contents(files, job.labels), 4 if job.options.crop == "face" else 32)
    if not processes:
        for labelled, contents in chunks:
            yield from zip(labelled, prepare.prepare(contents, job.options), strict=True)
        return
    with workers(processes, __name__) as pool:
        try:
            yield from _in_processes(chunks, job.options, pool, 3 * processes)
        except BrokenProcessPool:
            raise Halted("a decoding process was killed, perhaps for want of memory: try --processes 1") from None


def _in_processes(
    chunks: Iterator[_Chunk], options: Options, pool: ProcessPoolExecutor, ahead: int
) -> Iterator[tuple[_Labelled, Results]]:
    running: collections.deque[tuple[list[_Labelled], Future[list[Results]]]] = collections.deque()
    while True:
        for labelled, contents in itertools.islice(chunks, ahead - len(running)):
            running.append((labelled, pool.submit(prepare.prepare, contents, options)))
        if not running:
            return
        labelled, future = running.popleft()
        yield from zip(labelled, future.result(), strict=True)


_Chunk = tuple[list[_Labelled], list[bytes | str]]


def _chunks(contents: Iterator[_Content], most: int) -> Iterator[_Chunk]:
    """Enough small files to be worth a message between processes, few enough large ones to bound the memory."""
    labelled: list[_Labelled] = []
    together: list[bytes | str] = []
    size = 0
    for file, content in contents:
        labelled.append(file)
        together.append(content)
        size += len(content)
        if len(labelled) == most or size >= 1 << 20:
            yield labelled, together
            labelled, together, size = [], [], 0
    yield labelled, together


def _contents(files: Iterator[_Listed], labels: Labels | None) -> Iterator[_Content]:
    """The content of each file in order; of buckets several at a time, since each answer takes its time."""
    ahead: collections.deque[tuple[_Labelled, Future[bytes | str]]] = collections.deque()
    threads = ThreadPoolExecutor(REMOTE_READS)
    try:
        for file, member, source in files:
            label = None if labels is None else labels.of(member.name, source.kind)
            if labels is not None and label is None:
                member = Member(member.name, problem="no label")
            if source.kind == "folder" and source.remote:
                ahead.append(((file, label), threads.submit(_content, member)))
                if len(ahead) < REMOTE_READS:
                    continue
            else:
                content = _content(member)
                yield from ((labelled, future.result()) for labelled, future in ahead)
                ahead.clear()
                yield (file, label), content
                continue
            labelled, future = ahead.popleft()
            yield labelled, future.result()
        yield from ((labelled, future.result()) for labelled, future in ahead)
    finally:
        threads.shutdown(cancel_futures=True)


def _content(member: Member) -> bytes | str:
    try:
        return member.read()
    except ImageError as error:
        return str(error)


def _drop_near_duplicates(store: Store) -> None:
    ids, signatures, pixels, keys = store.signatures()
    if len(ids) < 2:
        return
    say(f"comparing {len(ids):,} pictures with each other")
    hashes = np.ascontiguousarray(signatures[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    dropped = near_duplicates(hashes, signatures[:, 8:], pixels, keys)
    for index, (kept, distance) in sorted(dropped.items()):
        store.drop(ids[index], f"{KEEP['near-duplicate']}: of ", ids[kept], distance)


def _write_rejections(store: Store, folder: Path, report: Report) -> None:
    """``rejected.csv``, and ``rejected.png`` if there is something to show."""
    # Names of files need not be UTF-8; what is not is written escaped.
    path = folder / "rejected.csv"
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "reason", "score"))
        for name, reason, score in store.rejections():
            table.writerow((name, reason, "" if score is None else f"{score:.4g}"))
    shown = {kind: pictures for kind in sorted(report.rejected) if (pictures := store.shown(kind, IMAGES))}
    if shown:
        rejected_sheet(shown).save(folder / "rejected.png")
