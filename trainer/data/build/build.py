"""Build a data set from image files.

The stages, in the order of this file: list the files of the sources, read them, prepare them in worker processes,
record the results in the ``Store``, reject near-duplicates, write the shards, publish the folder or upload it. Every
image is kept, or listed in ``rejected.csv`` with the reason. The store is in a hidden folder, from which a build that
was killed continues.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from catgan.command import say
from catgan.dataset import Manifest, tool
from catgan.files import cache_dir
from catgan.location import is_url, resolved_path
from catgan.machine import cores
from catgan.outputs import in_words
from catgan.text import printable
from trainer.data.build import prepare, sources, upload
from trainer.data.build.duplicates import near_duplicates, split_signatures
from trainer.data.build.errors import NoUsableImageError, ResumableError
from trainer.data.build.faces import FaceFinder
from trainer.data.build.folder import partial_folder, publish, work_folder
from trainer.data.build.labels import Labels
from trainer.data.build.prepare import Options, PreparedFile, RawFile, prepare_files
from trainer.data.build.progress import progress
from trainer.data.build.shards import DataSetSpec, plan, write_data_set
from trainer.data.build.sheet import IMAGES, rejected_sheet
from trainer.data.build.sources import Member, Source
from trainer.data.build.store import File, Rejected, Store
from trainer.data.build.workers import map_ordered, worker_processes, worker_threads
from trainer.data.images import ImageError

REMOTE_READS = 16  # files of a bucket that are fetched at the same time
_CHUNK_BYTES = 1 << 20  # of the files that are sent to a process together


@dataclass
class Report:
    """What became of the images.

    Attributes:
        kept: number of images in the data set.
        rejected: number of other images by kind of reason.
        shards: number of shards, also of a dry run.
        enlarged: number of kept images that were smaller than the data set's size.
        ignored_profiles: number of kept images with a colour profile that cannot be used.
        resumed: number of files that an earlier process had read already.
        relabelled: number of duplicates with another label than the image that is kept.
        own: folders in the sources whose files were skipped because this project's commands wrote them, with their
            kind; empty if an earlier process had read all sources.
    """

    kept: int = 0
    rejected: collections.Counter[str] = field(default_factory=collections.Counter)
    shards: int = 0
    enlarged: int = 0
    ignored_profiles: int = 0
    resumed: int = 0
    relabelled: int = 0
    own: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.kept + self.rejected.total()

    def __str__(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.rejected.most_common())


@dataclass(frozen=True)
class _Job:
    """All that decides the result. A build continues the work of an earlier one if their jobs are equal."""

    sources: list[Source]
    options: Options
    labels: Labels | None
    seed: int
    val_fraction: float

    def identity(self) -> dict[str, Any]:
        """Equal for equal jobs; JSON, stored with the work."""
        return {
            "tool": tool(),
            "sources": [[source.absolute_location, source.kind, source.version] for source in self.sources],
            "labels": self.labels and f"cls, {self.labels.identity}",
            "seed": self.seed,
            **self.spec().options,
        }

    def spec(self) -> DataSetSpec:
        """The data set, with the options for its manifest; those that were not used are left out."""
        options = self.options
        recorded: dict[str, Any] = {"size": options.size, "crop": options.crop, "min_size": options.min_size}
        if options.crop == "face":
            recorded["faces"] = options.faces
        if options.keep:
            recorded["keep"] = list(options.keep)
        recorded["val_fraction"] = self.val_fraction
        names = tuple(printable(source.name) for source in self.sources)
        return DataSetSpec(options.size, self.seed, self.val_fraction, names, recorded)


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
    """Build the data set ``out`` from folders, zips, tars, data sets and single images, local or remote.

    A build that was killed, interrupted or stopped by the network continues when it is called again with the same
    arguments and unchanged sources; only ``processes`` may differ.

    Args:
        paths: paths or URLs, see ``sources.identify``.
        out: a path, or the URL of a folder in a bucket.
        size: side of the data set's images, in pixels.
        crop: ``"center"``, ``"none"`` or ``"face"``; see ``prepare.Options``, also for ``faces``.
        keep: checks to switch off, of ``prepare.OPTIONAL_CHECKS``.
        labels: see ``labels.Labels``; None for a data set without labels.
        val_fraction: share of the images kept for validation, 0 to 1.
        seed: of the order of the images, which decides which are for validation.
        min_size: reject images with a shorter side below this; None is half of ``size``, rounded up.
        processes: worker processes; None is one for each core, 0 prepares in this process.
        dry_run: neither read nor write ``out``, only count; the returned manifest is None.

    Raises:
        UserError: a source cannot be read at all, or ``out`` is not empty.
        NoUsableImageError: all images were rejected. Nothing is kept.
        ResumableError: a failure that may be temporary. The work so far is kept.
    """
    min_size = -(-size // 2) if min_size is None else min_size
    out = upload.check_url(str(out)) if is_url(out) else resolved_path(out)
    job = _Job(
        sources=[replace(sources.identify(path), without=str(out)) for path in paths],
        options=Options(size, crop, min_size, faces, tuple(sorted(set(keep)))),
        labels=None if labels is None else Labels(labels),
        seed=seed,
        val_fraction=val_fraction,
    )
    if crop == "face":
        FaceFinder().load()  # fails early, and exports the network once instead of in each process
    processes = cores() if processes is None else processes
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch), seed, images=False) as store:
            return None, _complete_store(store, job, processes)
    return _build_and_publish(job, out, processes)


def _build_and_publish(job: _Job, out: str | Path, processes: int) -> tuple[Manifest, Report]:
    """``out`` is a URL without a final slash, or a path without ``..`` and links."""
    url = str(out) if is_url(out) else ""
    with work_folder(_upload_folder(url) if url else partial_folder(out), out) as folder:
        with Store(folder, job.seed) as store:
            _begin_or_continue(store, job, folder, url)
            report = _complete_store(store, job, processes)
            manifest = write_data_set(store, folder, job.spec())
            _write_rejections(store, folder, report)
            if url:
                upload.upload(folder, url, store)
                return replace(manifest, root=url), report
        publish(folder, Path(out))
    return Manifest.load(out), report


def _upload_folder(url: str) -> Path:
    return cache_dir() / "builds" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _begin_or_continue(store: Store, job: _Job, folder: Path, url: str) -> None:
    """Clear the store unless its work belongs to this job. Raises UserError if the bucket holds other objects."""
    earlier = store.note("job")
    is_same = earlier == job.identity()
    if url:
        upload.check_vacant(url, store.uploads() if is_same else ())
    if is_same:
        return
    if earlier is not None:
        say(f"the work in {folder} is of a build with other options or sources: starting over")
    _start_over(store, job)


def _start_over(store: Store, job: _Job) -> None:
    store.clear()
    store.set_note("job", job.identity())


def _complete_store(store: Store, job: _Job, processes: int) -> Report:
    """Complete the store: prepare the files that it lacks, then reject near-duplicates."""
    resumed = _read_sources(store, job, processes)
    if "near-duplicate" not in job.options.keep and not store.note("compared"):
        _reject_near_duplicates(store)
        store.set_note("compared", True)
    own = {folder: kind for source in job.sources for folder, kind in source.own.items()}
    report = Report(len(store), store.num_rejected(), resumed=resumed, own=own)
    if not report.kept:
        name, reason, _ = next(store.rejections(), ("", "", None))
        why = f"{report}, beginning with {name} ({reason})" if report.rejected else "there are no files of images"
        if own:
            why += f", except those of {in_words(own)}; give photos, or the folder of a data set itself"
        locations = ", ".join(source.location for source in job.sources)
        raise NoUsableImageError(f"no usable image in {locations}: {why}")
    report.relabelled = store.num_relabelled()
    report.enlarged = store.num_smaller_than(job.options.size)
    report.ignored_profiles = store.num_ignored_profiles()
    report.shards = len(plan(store, job.val_fraction))
    return report


@dataclass(frozen=True)
class _Listed:
    """A file of a source that was not read yet."""

    file: File
    member: Member
    source: Source
    label: str | None


def _read_sources(store: Store, job: _Job, processes: int) -> int:
    """Read and prepare the files that the store lacks. Returns the number of files that it had already."""
    was_complete = bool(store.note("read"))
    if was_complete and all(source.kind != "folder" for source in job.sources):
        # The job has the versions of all other sources: only folders are listed again.
        return store.num_files()
    listed = _list_files(job)
    changed = _skip_known(listed, store.files(), was_complete)
    if changed is not None:
        say(f"{changed} is new or has changed since the build was stopped: starting over")
        _start_over(store, job)
        listed, was_complete = _list_files(job), False
    resumed = store.num_files()
    if was_complete:
        return resumed
    if resumed:
        say(f"continuing after {resumed:,} files that were read before")
    # Each face takes half a second, so that with faces large chunks would lose much work when a build is stopped.
    chunk_files = 4 if job.options.crop == "face" else 32
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(worker_threads(REMOTE_READS))
        pool = stack.enter_context(worker_processes(processes, prepare.__name__)) if processes else None
        chunks = _chunks(_read_files(listed, job, threads), chunk_files)
        prepared = map_ordered(partial(prepare_files, options=job.options), chunks, pool, 3 * processes)
        _record(store, prepared, _count(job.sources), resumed)
    for remark in job.labels.remarks() if job.labels else ():
        say(remark)
    store.set_note("read", True)
    return resumed


def _list_files(job: _Job) -> Iterator[_Listed]:
    number = itertools.count()
    for source in job.sources:
        for member in source.members():
            file = File(next(number), printable(member.name), member.length, member.version)
            label = job.labels.of(member.name, source.kind) if job.labels else None
            yield _Listed(file, member, source, label)


def _skip_known(listed: Iterator[_Listed], known: Iterable[File], all_known: bool) -> str | None:
    """Advance ``listed`` past the files that are ``known``.

    Args:
        all_known: whether no file may follow these.

    Returns:
        The name of the first file that is missing, new or changed; None if there is none.
    """
    for file in known:
        found = next(listed, None)
        if found is None or found.file != file:
            return file.name
    if all_known and (found := next(listed, None)) is not None:
        return found.file.name
    return None


def _read_files(listed: Iterable[_Listed], job: _Job, threads: Executor) -> Iterator[RawFile]:
    """Read files in order; those of buckets several at a time, because of the latency of each request."""
    read = partial(_read_file, needs_label=job.labels is not None)
    for concurrent, group in itertools.groupby(listed, lambda one: one.source.allows_concurrent_reads):
        yield from map_ordered(read, group, threads if concurrent else None, REMOTE_READS)


def _read_file(listed: _Listed, needs_label: bool) -> RawFile:
    if needs_label and listed.label is None:
        return RawFile(listed.file, None, Rejected("no label"))
    try:
        return RawFile(listed.file, listed.label, listed.member.read())
    except ImageError as error:
        listed.source.check_is_there()
        return RawFile(listed.file, listed.label, Rejected(str(error)))


def _chunks(files: Iterable[RawFile], max_files: int) -> Iterator[list[RawFile]]:
    """Chunks of enough small files to be worth a message between processes, and few large ones, to bound the memory."""
    chunk: list[RawFile] = []
    size = 0
    for file in files:
        chunk.append(file)
        size += 0 if isinstance(file.content, Rejected) else len(file.content)
        if len(chunk) == max_files or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _record(store: Store, prepared: Iterable[list[PreparedFile]], total: int | None, resumed: int) -> None:
    """Add prepared files to the store, with a progress bar."""
    recorded = resumed
    try:
        for file in progress(itertools.chain.from_iterable(prepared), "read", "image", total, resumed):
            store.add(file.file, file.results, label=file.label)
            recorded += 1
    except BrokenProcessPool:
        raise ResumableError("a worker process was killed, perhaps for lack of memory: try --processes 1") from None
    assert store.num_files() == recorded, (store.num_files(), recorded)


def _count(counted: Iterable[Source]) -> int | None:
    """The number of files, if all sources know theirs."""
    counts = [source.count() for source in counted]
    return None if None in counts else sum(filter(None, counts))


def _reject_near_duplicates(store: Store) -> None:
    kept = store.signatures()
    if len(kept.rows) < 2:
        return
    say(f"comparing {len(kept.rows):,} images with each other")
    hashes, thumbnails = split_signatures(kept.signatures)
    dropped = near_duplicates(hashes, thumbnails, kept.pixels, kept.keys)
    for index, (of, distance) in sorted(dropped.items()):
        store.reject_near_duplicate(kept.rows[index], kept.rows[of], distance)


def _write_rejections(store: Store, folder: Path, report: Report) -> None:
    """Write ``rejected.csv``, and ``rejected.png`` if any rejected image has a preview."""
    with (folder / "rejected.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "reason", "score"))
        for name, reason, score in store.rejections():
            table.writerow((name, reason, "" if score is None else f"{score:.4g}"))
    previews = {kind: images for kind in sorted(report.rejected) if (images := store.previews(kind, IMAGES))}
    if previews:
        rejected_sheet(previews).save(folder / "rejected.png")
