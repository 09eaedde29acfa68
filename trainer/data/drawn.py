"""The embedded data set: drawn cats, made when they are first asked for and kept in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from infer.command import UserError, say
from trainer.data.shards import MANIFEST, Manifest, write_shards
from trainer.data.synth import draw_many

NUM = 4096


def cache_folder() -> Path:
    """Where things lie that can be made again: CATGAN_CACHE, else ``catgan`` in the user's cache folder."""
    if given := os.environ.get("CATGAN_CACHE"):
        return Path(given).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "catgan"


def open_data(location: str | None, size: int) -> Manifest:
    """The shards at ``location``; None: drawn cats of ``size`` pixels, drawn now if this machine has none yet.

    Drawing is deterministic, so each node of a cluster may make its own copy.
    """
    if location is not None:
        return Manifest.load(location)
    folder = cache_folder() / f"drawn-cats-{NUM}-{size}"
    if not (folder / MANIFEST).exists():
        say(f"drawing {NUM} cats at {size}x{size} into {folder}")
        try:
            write_shards(folder, draw_many(0, NUM, size), size=size, source=["catdata synth"], options={"num": NUM})
        except UserError:
            # Two workers of one node may both have begun; whoever comes second finds the first one's work.
            if not (folder / MANIFEST).exists():
                raise
    return Manifest.load(folder)
