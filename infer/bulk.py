"""Many single pictures: as files in a folder or as WebDataset shards, in constant memory, resumable.

A file ``.catinfer.json`` in the folder tells, while the work is unfinished, what is being made and how much of it is
complete. The same command goes on from there; each picture follows from its seed, so that the result is the same to
the byte as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.files import atomic_open, remove_partials
from infer.files import STATE

MANIFEST = "manifest.json"
CONTACT = "contact.png"
FORMAT_VERSION = 1  # of data sets, see trainer.data.manifest
SHARD = 1000  # pictures of one shard, about 10 MB at 64 pixels
PART = 250  # files of a folder from one note of the progress to the next


class Progress:
    """What is complete of the work in ``folder``: the first ``done`` pictures, and of shards their entries.

    ``settings`` is all that the pictures depend on. Raises ``UserError`` where other work is unfinished.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path = folder / STATE
        self._settings = settings
        self.done = 0
        self.shards: list[dict[str, Any]] = []
        try:
            state = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); delete it to begin anew") from error
        if not isinstance(state, dict) or state.get("settings") != settings:
            raise UserError(
                f"{folder}: holds the unfinished work of another command; repeat that one, choose another folder, or "
                f"delete {self._path} to begin anew"
            )
        self.done, self.shards = state["done"], state["shards"]
        say(f"{folder}: going on after {self.done:,} pictures")

    def begin(self) -> None:
        """Remove what a killed process left half-written, and leave a note before anything else is written."""
        remove_partials(
            self._path.parent, lambda name: name in (STATE, MANIFEST, CONTACT) or name.startswith(("cat-", "train-"))
        )
        self.save()

    def save(self) -> None:
        with atomic_open(self._path) as file:
            file.write(json.dumps({"settings": self._settings, "done": self.done, "shards": self.shards}).encode())

    def finish(self) -> None:
        self._path.unlink()


def settings(digest: str, seeds: Sequence[int], psi: float, suffix: str, provider: str, shards: bool) -> dict[str, Any]:
    """All that the files depend on, in values that JSON gives back unchanged."""
    listed = hashlib.sha256(",".join(map(str, seeds)).encode()).hexdigest()
    return {
        "generator_sha256": digest,
        "seeds_sha256": listed,
        "psi": psi,
        "suffix": suffix,
        "provider": provider,
        "shards": shards,
    }


def write_files(folder: Path, seeds: Sequence[int], suffix: str, pictures: Iterator[bytes], progress: Progress) -> None:
    """One file for each seed, such as ``cat-000003.png``; existing ones are replaced.

    ``pictures`` are the encoded ones that ``progress`` does not count as done, in order.
    """
    while part := seeds[progress.done : progress.done + PART]:
        for seed, content in zip(part, islice(pictures, len(part)), strict=True):
            with atomic_open(folder / f"cat-{seed:06d}{suffix}") as file:
                file.write(content)
        progress.done += len(part)
        progress.save()
    progress.finish()


def sha256(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shards(
    folder: Path,
    seeds: Sequence[int],
    size: int,
    psi: float,
    pictures: Iterator[bytes],
    progress: Progress,
    options: dict[str, Any],
) -> None:
    """A data set as ``catdata`` writes it, all of it in the split ``train``: shards, then ``manifest.json``.

    ``pictures`` are the encoded ones that ``progress`` does not count as done, in order. Each becomes a sample
    ``<seed, 8 digits>.png`` with ``<seed>.json`` (seed, psi).
    """
    while part := seeds[progress.done : progress.done + SHARD]:
        path = folder / f"train-{len(progress.shards):06d}.tar"
        progress.shards.append(_write_shard(path, part, psi, islice(pictures, len(part))))
        progress.done += len(part)
        progress.save()
    with atomic_open(folder / MANIFEST) as file:
        file.write(_manifest(progress.shards, len(seeds), size, seeds[0], options))
    progress.finish()


def _write_shard(path: Path, seeds: Sequence[int], psi: float, pictures: Iterable[bytes]) -> dict[str, Any]:
    with atomic_open(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for seed, picture in zip(seeds, pictures, strict=True):
                for suffix, content in (("png", picture), ("json", _canonical({"psi": psi, "seed": seed}))):
                    # TarInfo's defaults (time 0, no owner) keep the bytes the same on every machine and day.
                    info = tarfile.TarInfo(f"{seed:08d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return {"name": path.name, "images": len(seeds), "sha256": digest.hexdigest(), "bytes": file.tell()}


def _manifest(shards: list[dict[str, Any]], images: int, size: int, seed: int, options: dict[str, Any]) -> bytes:
    """``manifest.json`` in the format of ``trainer.data.manifest``, which inference must not import."""
    hashes = {"train": [shard["sha256"] for shard in shards], "val": []}
    record = {
        "format_version": FORMAT_VERSION,
        "size": size,
        "digest": hashlib.sha256(_canonical([FORMAT_VERSION, size, hashes])).hexdigest(),
        "splits": {"train": {"images": images, "shards": shards}, "val": {"images": 0, "shards": []}},
        "seed": seed,
        "source": ["catinfer"],
        "options": options,
        "tool": _tool(),
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _tool() -> str:
    try:
        return f"catgan {version('catgan')}"
    except PackageNotFoundError:  # run from a plain checkout
        return "catgan"
