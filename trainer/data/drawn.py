"""The embedded data set: drawn cats, made when they are first asked for and kept in the cache folder."""

from __future__ import annotations

from infer.command import UserError, say
from trainer.data.manifest import MANIFEST, Manifest
from trainer.data.shards import write_shards
from trainer.data.synth import draw_many
from trainer.metrics.cache import cache_dir

NUM = 4096


def open_data(location: str | None, size: int) -> Manifest:
    """The shards at ``location``; None: drawn cats of ``size`` pixels, drawn now if this machine has none yet.

    Drawing is deterministic, so each node of a cluster may make its own copy.
    """
    if location is not None:
        return Manifest.load(location)
    folder = cache_dir() / f"drawn-cats-{NUM}-{size}"
    if not (folder / MANIFEST).exists():
        say(f"drawing {NUM} cats at {size}x{size} into {folder}")
        try:
            write_shards(folder, draw_many(0, NUM, size), size=size, source=["catdata synth"], options={"num": NUM})
        except UserError:
            # Two workers of one node may both have begun; whoever comes second finds the first one's work.
            if not (folder / MANIFEST).exists():
                raise
    return Manifest.load(folder)
