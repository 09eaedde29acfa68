"""Check a whole data set against its manifest."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import IO

from PIL import Image

from catgan.command import UserError
from catgan.dataset import MANIFEST, Manifest, Shard
from catgan.location import is_url, join
from catgan.text import printable
from trainer.data.build.progress import progress
from trainer.data.fetch import class_number, shards_ahead
from trainer.data.reasons import reason_of
from trainer.data.tars import StrictInfo


def verify(location: str | Path) -> Manifest:
    """Read the whole data set at ``location``, a path or a URL, and compare it with its manifest.

    Checks each shard's SHA-256 and number of images, that each sample is an RGB image of the right size with its JSON
    and, if the images have classes, the number of one of them, as often as the manifest says; that no key occurs twice,
    and that a local folder has no shard which the manifest does not list.

    Raises:
        UserError: the first difference, with the name of the shard.
    """
    manifest = Manifest.load(location)
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    split_of = {shard.name: name for name, split in manifest.splits.items() for shard in split.shards}
    if not is_url(manifest.root):
        present = {path.name for path in Path(manifest.root).glob("*.tar")}
        if unlisted := sorted(present - set(shards)):
            raise UserError(f"{Path(manifest.root, unlisted[0])} is not in {MANIFEST}: remove it, or build again")
    keys: set[str] = set()
    labels: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    num_classes = len(manifest.labels) if manifest.is_labelled else 0
    contents = shards_ahead(manifest, shards.values())
    for shard, content in zip(progress(shards.values(), "verify", "shard", len(shards)), contents, strict=True):
        path = join(manifest.root, shard.name)
        try:
            if isinstance(content, OSError):
                raise content
            shard_keys, shard_labels = _check_shard(content, shard, manifest.size, num_classes)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{path} is damaged: {error}; copy it again, or build it again") from None
        if repeated := keys.intersection(shard_keys):
            raise UserError(f"{path}: sample {min(repeated)} is also in an earlier shard; build the data set again")
        keys.update(shard_keys)
        labels[split_of[shard.name]].update(shard_labels)
    for name, split in manifest.splits.items() if num_classes else ():
        for i, (label, expected) in enumerate(zip(manifest.labels, split.class_counts, strict=True)):
            if (found := labels[name][i]) != expected:
                raise UserError(
                    f"{join(manifest.root, MANIFEST)} is damaged: {expected} {name} images of {printable(label)!r}, "
                    f"the shards hold {found}; copy it again, or build it again"
                )
    return manifest


def _check_shard(content: bytes, shard: Shard, size: int, num_classes: int) -> tuple[list[str], list[int]]:
    """The keys and the classes of a shard that passes all checks. Raises ValueError, OSError or TarError with the first
    difference."""
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ValueError("its sha256 is not the manifest's")
    samples: dict[str, set[str]] = {}
    classes: dict[str, int] = {}
    recorded: dict[str, object] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", tarinfo=StrictInfo) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            if file is None or suffix in samples.setdefault(key, set()):
                raise ValueError(f"{member.name} is not a file, or occurs twice")
            samples[key].add(suffix)
            try:
                if suffix == "cls" and num_classes:
                    classes[key] = class_number(file.read(), num_classes)
                elif suffix == "json":
                    record = json.load(file)
                    recorded[key] = record.get("label") if isinstance(record, dict) else None
                else:
                    _check_image(file, size)
            except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError) as error:
                raise ValueError(f"{member.name}: {reason_of(error)}") from None
    for key, suffixes in samples.items():
        others = {"json", "cls"} if num_classes else {"json"}
        if suffixes - others not in ({"webp"}, {"png"}) or not others <= suffixes:
            wanted = " and its json and cls" if num_classes else " and its json"
            raise ValueError(f"sample {key} has {', '.join(sorted(suffixes))} instead of an image{wanted}")
        if num_classes and recorded[key] != classes[key]:
            raise ValueError(f"sample {key} has the class {classes[key]} in its cls, {recorded[key]} in its json")
    if len(samples) != shard.images:
        raise ValueError(f"it holds {len(samples)} images, the manifest says {shard.images}")
    return list(samples), list(classes.values())


def _check_image(content: IO[bytes], size: int) -> None:
    with Image.open(content, formats=("PNG", "WEBP")) as image:
        # Known from the header, before memory is allocated for the pixels.
        if (image.mode, *image.size) != ("RGB", size, size):
            raise ValueError(f"it is {image.mode} {image.width}x{image.height}, not RGB {size}x{size}")
        image.load()
