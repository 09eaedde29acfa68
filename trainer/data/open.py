"""Opening a data set: the one at a location, or the embedded one, which is 4096 drawn cats.

Drawn cats are made on first use and kept in the cache folder.
"""

from __future__ import annotations

from dataclasses import replace

from catgan.command import UserError, say
from catgan.dataset import MANIFEST, Manifest
from catgan.files import cache_dir
from catgan.location import local_path
from trainer.config import LoaderConfig
from trainer.data.build.shards import write_shards
from trainer.data.drawn.coats import COATS
from trainer.data.drawn.synth import CLASS, DRAWN_CATS, draw_many

NUM_DRAWN = 4096
DRAWN_CLASSES = tuple(sorted(COATS))
"""The classes of drawn cats, the patterns of their coats; all of them occur among ``NUM_DRAWN`` cats."""


def open_data(location: str | None, size: int, loader: LoaderConfig, labelled: bool = False) -> Manifest:
    """The manifest of the data set at ``location``, a path or a URL, with the cache and ``max_broken`` of ``loader``.

    Args:
        location: None: drawn cats of ``size`` x ``size`` pixels. They are the same on every machine, so each node of a
            cluster draws its own.
        size: side of the images in pixels, for drawn cats only.
        labelled: whether drawn cats have classes, those of ``DRAWN_CLASSES``.

    Raises:
        UserError: there is no data set at ``location``, or it is damaged; see ``Manifest.load``.
    """
    manifest = _open_drawn(size, labelled) if location is None else Manifest.load(location)
    cache = str(local_path(loader.cache).absolute()) if loader.cache else ""
    return replace(manifest, cache=cache, max_broken=loader.max_broken)


def _open_drawn(size: int, labelled: bool) -> Manifest:
    folder = cache_dir() / f"drawn-cats-{NUM_DRAWN}-{size}{'-classes' if labelled else ''}"
    if not (folder / MANIFEST).exists():
        say(f"drawing {NUM_DRAWN} cats at {size}x{size} into {folder}")
        options = {"num": NUM_DRAWN, "val_fraction": 0.1}  # as of `catdata synth`
        cats = draw_many(seed=0, num=NUM_DRAWN, size=size)
        try:
            label = CLASS if labelled else None
            write_shards(folder, cats, size=size, source=[DRAWN_CATS], options=options, label=label)
        except UserError:
            # Workers on the same node may draw at the same time: the first to finish wins, and the others use its set.
            if not (folder / MANIFEST).exists():
                raise
    return Manifest.load(folder)
