"""Many images as single files in a folder or as WebDataset shards, in constant memory, resumable.

While the work is unfinished, ``.catinfer.json`` in the folder records the job and how much of it is complete. The same
command continues there. An image depends on its seed alone, so the result is byte for byte that of an uninterrupted
run.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from catgan.command import UserError, say
from catgan.dataset import MANIFEST, Manifest, Shard, Split, canonical_json, tool, write_shard
from catgan.files import atomic_open, remove_partials
from infer.classes import Class, class_of
from infer.files import STATE
from infer.provenance import SOURCE_TYPE, seeds_sha256

CONTACT = "contact.png"
SHARD = 1000  # images per shard, about 10 MB at 64 pixels
PART = 250  # single files between two updates of the state file
_NOT_IN_NAMES = re.compile(r"[^\w-]+")
_NAME = 40  # characters of a class in a file's name


@dataclass(frozen=True)
class Job:
    """Everything that the content of the files depends on.

    Attributes:
        generator_sha256: of the ONNX file, in hex.
        seeds: one per image.
        psi: truncation, see ``infer.session.Generator``.
        suffix: of the image files, such as ".png".
        provider: onnxruntime's name of the device.
        shards: whether the images become a data set instead of single files.
        software: name and version of this program, which the files say made them; None if they say nothing.
        directions: {number of a direction: multiple} that all latents are moved by.
        classes: take turns with the seeds, see ``infer.classes.class_of``; none if the generator has none.
    """

    generator_sha256: str
    seeds: Sequence[int]
    psi: float
    suffix: str
    provider: str
    shards: bool
    software: str | None = None
    directions: Mapping[int, float] = field(default_factory=dict)
    classes: Sequence[Class] = ()

    @property
    def point(self) -> dict[str, Any]:
        """How the latent of a seed is changed, for JSON; without ``directions`` as before there were any."""
        moved = {str(number): amount for number, amount in sorted(self.directions.items())}
        return {"psi": self.psi, "directions": moved} if moved else {"psi": self.psi}

    @property
    def chosen(self) -> dict[str, Any]:
        """The names of the classes, for JSON; without classes as before there were any."""
        return {"classes": [one.name for one in self.classes]} if self.classes else {}

    def file_name(self, seed: int) -> str:
        """Of a single file: ``cat-000003.png``, or if there are several classes ``cat-000003-tabby.png``."""
        one = class_of(seed, self.classes)
        name = f"-{_NOT_IN_NAMES.sub('-', one.name)[:_NAME]}" if one and len(self.classes) > 1 else ""
        return f"cat-{seed:06d}{name}{self.suffix}"

    def settings(self) -> dict[str, Any]:
        """The job in values that JSON gives back unchanged."""
        settings = {
            "generator_sha256": self.generator_sha256,
            "seeds_sha256": seeds_sha256(self.seeds),
            **self.point,
            **self.chosen,
            "suffix": self.suffix,
            "provider": self.provider,
            "shards": self.shards,
        }
        # Without it as in earlier versions, whose unfinished work can be continued so.
        return settings if self.software is None else {**settings, "software": self.software}

    def record(self, seed: int) -> dict[str, Any]:
        """The attributes of an image in a shard."""
        record = {**self.point, "seed": seed}
        if one := class_of(seed, self.classes):
            record["label"] = one.label
        if self.software is None:
            return record
        return {**record, "digital_source_type": SOURCE_TYPE, "generator_sha256": self.generator_sha256}


class Progress:
    """The state file of the job in ``folder``.

    Attributes:
        folder: see above.
        done: number of complete images, the first ones of the job.
        shards: the complete shards.

    Raises:
        UserError: the folder holds the unfinished work of another job, or the state file cannot be read.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self._path = folder / STATE
        self._settings = job.settings()
        self.done = 0
        self.shards: list[Shard] = []
        try:
            state = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); delete it to start over") from error
        if not isinstance(state, dict) or state.get("settings") != self._settings:
            raise UserError(
                f"{folder}: holds the unfinished work of another command; repeat that one, choose another folder, or "
                f"delete {self._path} to start over"
            )
        self.done, self.shards = state["done"], [Shard(**shard) for shard in state["shards"]]
        if job.shards:  # those before the first one that someone has removed or cut
            self.shards = [*itertools.takewhile(lambda shard: _is_written(folder, shard), self.shards)]
            self.done = sum(shard.images for shard in self.shards)
        say(f"{folder}: continuing after {self.done:,} images")

    def begin(self) -> None:
        """Remove partial files of a killed process, and write the state file before any other file."""
        remove_partials(
            self.folder, lambda name: name in (STATE, MANIFEST, CONTACT) or name.startswith(("cat-", "train-"))
        )
        self.save()

    def save(self) -> None:
        with atomic_open(self._path) as file:
            shards = [asdict(shard) for shard in self.shards]
            file.write(json.dumps({"settings": self._settings, "done": self.done, "shards": shards}).encode())

    def finish(self) -> None:
        self._path.unlink()


def _is_written(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes


def write_files(folder: Path, job: Job, images: Iterator[bytes], progress: Progress) -> None:
    """Write one file per seed, see ``Job.file_name``. Existing files are replaced.

    ``images`` are the encoded images after those that are done, in order.
    """
    while part := job.seeds[progress.done : progress.done + PART]:
        for seed, content in zip(part, islice(images, len(part)), strict=True):
            with atomic_open(folder / job.file_name(seed)) as file:
                file.write(content)
        progress.done += len(part)
        progress.save()
    progress.finish()


def write_shards(
    folder: Path, job: Job, size: int, images: Iterator[bytes], progress: Progress, classes: Sequence[str] = ()
) -> None:
    """Write a data set in the format of ``catdata``, with the split ``train`` alone: shards, then ``manifest.json``.

    ``images`` are the encoded images of ``size`` pixels after those that are done, in order. Each becomes a sample of
    ``<seed, 8 digits>.png``, ``.json``, see ``Job.record``, and ``.cls`` if the generator has ``classes``, the names of
    all of them.
    """
    while part := job.seeds[progress.done : progress.done + SHARD]:
        path = folder / f"train-{len(progress.shards):06d}.tar"
        progress.shards.append(_write_shard(path, part, job, islice(images, len(part))))
        progress.done += len(part)
        progress.save()
    found = Counter(itertools.chain.from_iterable(_label(job, seed) for seed in job.seeds))
    counts = tuple(found[label] for label in range(len(classes)))
    manifest = Manifest(
        root=str(folder),
        size=size,
        splits={"train": Split(tuple(progress.shards), counts), "val": Split((), (0,) * len(counts))},
        seed=job.seeds[0],
        source=("catinfer",),
        options={"generator_sha256": job.generator_sha256, **job.point, **job.chosen, "provider": job.provider},
        tool=tool(),
        labels=tuple(classes),
    )
    with atomic_open(folder / MANIFEST) as file:
        file.write(manifest.to_json())
    progress.finish()


def _label(job: Job, seed: int) -> tuple[int, ...]:
    one = class_of(seed, job.classes)
    return () if one is None else (one.label,)


def _write_shard(path: Path, seeds: Sequence[int], job: Job, images: Iterable[bytes]) -> Shard:
    samples: Iterable[tuple[str, str, bytes, bytes, *tuple[int, ...]]] = (
        (f"{seed:08d}", "png", image, canonical_json(job.record(seed)), *_label(job, seed))
        for seed, image in zip(seeds, images, strict=True)
    )
    with atomic_open(path, durable=True) as file:
        return write_shard(file, path.name, samples)
