"""Pictures as people have them (folders, zips, tars) made into a data set.

One process reads the sources in order and writes, the others decode, resize and encode. Every file that is looked at
is kept or listed in ``rejected.csv`` with the reason. Not looked at, by name alone: hidden files, ``__MACOSX`` and
notes beside pictures (``.json``, ``.txt``, ``.csv``...).
"""

from __future__ import annotations

import collections
import csv
import itertools
import lzma
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from infer.command import UserError, say
from trainer.data.images import ImageError, decode, encode, pixel_digest, to_square
from trainer.data.shards import MANIFEST, Manifest, ShardWriter, local_path, new_folder

MAX_FILE_BYTES = 256 << 20
"""Longer files are rejected unread: they are read into memory, and a zip can claim any length."""

_NOTES = {".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".cls"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z"}

# What reading a file, a member of a zip or of a tar can raise when it is damaged, encrypted or packed unusually.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Options:
    """How a picture becomes a sample; ``min_size`` is the least length of its shorter side in pixels."""

    size: int
    crop: str
    min_size: int


@dataclass(frozen=True)
class Candidate:
    """A file looked at as a picture: its content, or the ``problem`` that kept it from being read."""

    name: str
    data: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Sample:
    """A picture ready for a shard: encoded at the data set's size, with the digest and size of the original."""

    picture: bytes
    digest: bytes
    width: int
    height: int


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    size: int,
    crop: str = "center",
    val_fraction: float = 0.1,
    seed: int = 0,
    min_size: int | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Build the data set ``out`` from folders, zips, tars, data sets and single pictures.

    Args:
        min_size: pictures whose shorter side has fewer pixels are rejected; None is half of ``size``.
        processes: to decode with; None is one for each core.

    Returns:
        {out, read, kept, rejected, shards}: ``read`` = ``kept`` + ``rejected`` counts the files looked at.

    Raises:
        UserError: a source cannot be read at all, nothing in them is usable, or ``out`` is taken. Nothing is left.
    """
    paths = [check_source(source) for source in sources]
    options = Options(size, crop, -(-size // 2) if min_size is None else min_size)
    with new_folder(out) as folder:
        writer = ShardWriter(folder, size)
        rejected = collections.Counter[str]()
        first: dict[bytes, str] = {}
        num_small = 0
        with (folder / "rejected.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("file", "reason"))
            for name, result in _samples(paths, options, processes):
                if isinstance(result, Sample) and result.digest in first:
                    result = f"duplicate: the same pixels as {first[result.digest]}"
                if isinstance(result, str):
                    table.writerow((name, result))
                    rejected[result.partition(":")[0]] += 1
                    continue
                first[result.digest] = name
                num_small += min(result.width, result.height) < size
                record = {"source": name, "width": result.width, "height": result.height}
                writer.add(result.picture, result.digest, record)
        kept = len(writer)
        reasons = ", ".join(f"{count} {kind}" for kind, count in rejected.most_common())
        if not kept:
            what = ", ".join(str(path) for path in paths)
            raise UserError(f"no usable picture in {what}: {reasons or 'no file to look at'} (--min-size {options.min_size})")
        manifest = writer.finish(
            seed=seed,
            val_fraction=val_fraction,
            source=[path.resolve().name for path in paths],
            options={**asdict(options), "val_fraction": val_fraction},
        )
    say(f"{kept} pictures kept" + (f", {rejected.total()} rejected ({reasons}): see {Path(out, 'rejected.csv')}" * bool(rejected)))
    if num_small:
        say(f"{num_small} of them were smaller than {size}x{size} and have been enlarged; --min-size {size} rejects them")
    shards = sum(len(split.shards) for split in manifest.splits.values())
    return {
        "out": str(out),
        "read": kept + rejected.total(),
        "kept": kept,
        "rejected": rejected.total(),
        "shards": shards,
    }


# Sources


def check_source(source: str | Path) -> Path:
    """``source`` as a path that exists and that ``candidates`` can read (UserError otherwise)."""
    path = local_path(source)
    try:
        if path.is_dir():
            return path
        if not path.is_file():
            raise UserError(f"no folder, zip, tar or picture at {path}")
        if path.suffix.lower() in _ARCHIVES and not (tarfile.is_tarfile(path) or zipfile.is_zipfile(path)):
            raise UserError(f"{path} is neither a zip nor a tar that can be read: a broken download, or another packer?")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return path


def candidates(path: Path) -> Iterator[Candidate]:
    """The files in a source that may be pictures, in an order that depends on the source alone."""
    name = path.resolve().name
    if path.is_file():
        if tarfile.is_tarfile(path):  # first: the end of a tar of zips looks like the end of a zip
            yield from _from_tar(path, name)
        elif zipfile.is_zipfile(path):
            yield from _from_zip(path, name)
        else:
            yield _read(name, path.stat().st_size, path.read_bytes)
    elif (path / MANIFEST).is_file() and next(path.glob("train-*.tar"), None):
        manifest = Manifest.load(path)
        for shard in itertools.chain(*map(manifest.paths, manifest.splits)):
            yield from _from_tar(Path(shard), f"{name}/{Path(shard).name}")
    else:
        yield from _from_folder(path, name)


def _from_folder(root: Path, name: str) -> Iterator[Candidate]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(root, onerror=refuse):
        inside = PurePosixPath(name, *Path(parent).relative_to(root).parts)
        folders[:] = sorted(folder for folder in folders if _is_candidate(folder))
        for folder in folders:
            if Path(parent, folder).is_symlink():
                yield Candidate(str(inside / folder), problem="a link to a folder: give that as a source")
        for file in sorted(filter(_is_candidate, files)):
            path = Path(parent, file)
            if path.is_file():
                yield _read(str(inside / file), path.stat().st_size, path.read_bytes)
            else:
                yield Candidate(str(inside / file), problem="not a file")


def _from_zip(path: Path, name: str) -> Iterator[Candidate]:
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and _is_candidate(info.filename):
                    yield _read(f"{name}/{info.filename}", info.file_size, lambda info=info: archive.read(info))  # type: ignore[misc]
    except _UNREADABLE as error:
        yield Candidate(name, problem=f"not readable: the zip is damaged, {error}")


class _StrictMember(tarfile.TarInfo):
    """tarfile takes garbage between two members for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictMember:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def _from_tar(path: Path, name: str) -> Iterator[Candidate]:
    try:
        with tarfile.open(path, "r:*", tarinfo=_StrictMember) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # a TarFile keeps what it has met: a GiB for a million members
                inside = f"{name}/{member.name}"
                if member.isdir() or not _is_candidate(member.name):
                    continue
                if member.isreg():
                    yield _read(inside, member.size, lambda member=member: _extract(tar, member))  # type: ignore[misc]
                else:
                    yield Candidate(inside, problem="not a file")
    except _UNREADABLE as error:
        yield Candidate(name, problem=f"not readable: the tar breaks off, {error}")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content is not None, member
    return content.read()


def _is_candidate(name: str) -> bool:
    """Whether a file is looked at: not hidden, no rubbish of macOS and no note beside pictures. ``name``: its path."""
    parts = PurePosixPath(name).parts
    return (
        not any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in parts)
        and PurePosixPath(name).suffix.lower() not in _NOTES
    )


def _read(name: str, length: int, read: Callable[[], bytes]) -> Candidate:
    if PurePosixPath(name).suffix.lower() in _ARCHIVES:
        return Candidate(name, problem="an archive: give it as a source of its own")
    if length > MAX_FILE_BYTES:
        return Candidate(name, problem=f"too large: {length:,} bytes, at most {MAX_FILE_BYTES:,}")
    try:
        return Candidate(name, read())
    except _UNREADABLE as error:
        return Candidate(name, problem=f"not readable: {error}")


# Work


def _prepare(candidates: list[Candidate], options: Options) -> list[Sample | str]:
    """For each candidate the sample, or the reason why there is none."""
    return [_prepare_one(candidate, options) for candidate in candidates]


def _prepare_one(candidate: Candidate, options: Options) -> Sample | str:
    if candidate.problem:
        return candidate.problem
    try:
        image = decode(candidate.data)
        if min(image.size) < options.min_size:
            return f"too small: {image.width}x{image.height}, the shorter side needs {options.min_size}"
        square = to_square(image, options.size, options.crop)
    except ImageError as error:
        return str(error)
    return Sample(encode(square), pixel_digest(image), image.width, image.height)


def _chunks(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Enough small files to make a message between processes worth it, few enough large ones to bound memory."""
    chunk: list[Candidate] = []
    size = 0
    for candidate in candidates:
        chunk.append(candidate)
        size += len(candidate.data)
        if len(chunk) == 32 or size > 1 << 20:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _samples(paths: list[Path], options: Options, processes: int | None) -> Iterator[tuple[str, Sample | str]]:
    """Name and sample (or reason) of every candidate, in the order of the sources."""
    chunks = _chunks(itertools.chain(*map(candidates, paths)))
    processes = processes or len(os.sched_getaffinity(0))
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"), _start_worker) as pool,
        tqdm(desc="build", unit=" pictures") as bar,
    ):
        running: collections.deque[tuple[list[str], Future[list[Sample | str]]]] = collections.deque()
        try:
            while True:
                for chunk in itertools.islice(chunks, 3 * processes - len(running)):
                    running.append(([candidate.name for candidate in chunk], pool.submit(_prepare, chunk, options)))
                if not running:
                    return
                names, future = running.popleft()
                yield from zip(names, future.result(), strict=True)
                bar.update(len(names))
        except BrokenProcessPool:
            raise UserError(
                f"a process was killed while it read pictures near {names[0]}, perhaps for memory: try --processes 1"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker whose parent was killed must not wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
