"""The embedded data set: drawn cats, made when they are first asked for and kept in the cache folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from catgan.command import UserError, say
from catgan.files import cache_dir
from trainer.config import LoaderConfig
from trainer.data.build.shards import write_shards
from trainer.data.drawn.synth import draw_many
from trainer.data.manifest import MANIFEST, Manifest

NUM = 4096


def open_data(location: str | None, size: int, loader: LoaderConfig) -> Manifest:
    """The shards at ``location``; None: drawn cats of ``size`` pixels, drawn now if this machine has none yet.

    Drawing is deterministic, so each node of a cluster may make its own copy.
    """
    manifest = _drawn(size) if location is None else Manifest.load(location)
    cache = str(Path(loader.cache).expanduser().absolute()) if loader.cache else ""
    return replace(manifest, cache=cache, max_broken=loader.max_broken)


def _drawn(size: int) -> Manifest:
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
