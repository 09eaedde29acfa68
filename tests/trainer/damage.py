"""Damage to data sets, as disks and downloads do it."""

import tarfile
from pathlib import Path

from catgan.dataset import Manifest


def damage(manifest: Manifest, number: int) -> str:
    """Overwrites the first picture of a train shard with zeros. Returns the shard's name."""
    shard = manifest.splits["train"].shards[number]
    path = Path(manifest.root, shard.name)
    with tarfile.open(path) as tar:
        first = next(info for info in tar if info.name.endswith(".webp"))
    data = bytearray(path.read_bytes())
    data[first.offset_data : first.offset_data + first.size] = bytes(first.size)
    path.write_bytes(data)
    return shard.name
