"""Pictures for race.py: shards shrunk to the race's size, and the same pictures as files for foreign scripts."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from catgan.command import UserError, say
from catgan.files import cache_dir
from infer.grid import grid
from trainer.config import LoaderConfig
from trainer.data.build.folder import new_folder
from trainer.data.build.progress import progress
from trainer.data.images import decode, encode, to_square
from trainer.data.manifest import MANIFEST, Manifest, Shard, Split
from trainer.data.open import open_data
from trainer.data.stream import eval_images

CONTACT = 64  # pictures in contact.png


def check_size(size: int, data: Manifest | None) -> None:
    """Raises UserError: no network has this size, or the shards' pictures are smaller."""
    if not 16 <= size <= 512 or size & (size - 1):
        raise UserError(f"pictures of {size}x{size}: give --size as a power of two from 16 to 512")
    if data is not None and data.size < size:
        raise UserError(
            f"--size {size}, but the pictures in {data.root} are {data.size}x{data.size}: give {data.size} or less,"
            " or build larger shards"
        )


def open_at(data: Manifest | None, size: int) -> Manifest:
    """Shards of this size: ``data`` itself, a shrunk copy of it in the cache folder, or (None) drawn cats."""
    if data is None:
        return open_data(None, size, LoaderConfig())
    if data.size == size:
        return data
    folder = cache_dir() / f"shrunk-{data.digest[:16]}-{size}"
    if not (folder / MANIFEST).exists():
        say(f"shrinking the pictures of {data.root} from {data.size}x{data.size} to {size}x{size} into {folder}")
        shrink(data, folder, size)
    return Manifest.load(folder)


def shrink(data: Manifest, out: Path, size: int) -> None:
    """Write the data set ``out``: the pictures of ``data`` with ``size`` pixels a side, otherwise the same.

    Shard by shard, under the same names: each picture stays in its split, which building a data set from the smaller
    pictures would not keep, for it splits by what the pictures show.
    """
    with new_folder(out) as folder:
        splits = {}
        contact: list[np.ndarray] = []
        for name in data.splits:
            shards = []
            paths = [Path(path) for path in data.paths(name)]
            for path in progress(paths, f"shrink {name}", "shard", len(paths)):
                shards.append(_shrink_shard(path, folder / path.name, size, contact))
            splits[name] = Split(tuple(shards))
        grid(np.stack(contact)).save(folder / "contact.png")
        options = {**data.options, "size": size, "shrunk_from": data.digest}
        Manifest(str(folder), size, splits, data.seed, data.source, options, data.tool).save()


def _shrink_shard(source: Path, target: Path, size: int, contact: list[np.ndarray]) -> Shard:
    """Copy a shard with smaller pictures; the first ones of the data set also go into ``contact``."""
    images = 0
    with tarfile.open(source, "r:") as tar, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as smaller:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None, member.name
            name, data = member.name, content.read()
            if not name.endswith(".json"):
                picture = to_square(decode(data), size, "none")
                name, data = f"{name.partition('.')[0]}.webp", encode(picture)
                images += 1
                if len(contact) < CONTACT:
                    contact.append(np.asarray(picture))
            info = tarfile.TarInfo(name)  # its defaults (time 0, no owner) are the same everywhere
            info.size = len(data)
            smaller.addfile(info, io.BytesIO(data))
    with target.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(target.name, images, sha256, target.stat().st_size)


def train_files(manifest: Manifest, out: Path) -> Path:
    """A folder in ``out`` with the train split as 000000.png, 000001.png, ..., written when first asked for."""
    folder = out / f"data-{manifest.digest[:12]}"
    if not folder.exists():
        total = manifest.splits["train"].images
        with new_folder(folder) as partial:
            for i, pixels in enumerate(progress(_pictures(manifest), "PNG files", "picture", total)):
                Image.fromarray(pixels).save(partial / f"{i:06d}.png")
    return folder.absolute()


def _pictures(manifest: Manifest) -> Iterator[np.ndarray]:
    """Each picture of the train split, uint8 ``[size, size, 3]``."""
    for batch in eval_images(manifest, "train"):
        yield from batch.permute(0, 2, 3, 1).contiguous().numpy()
