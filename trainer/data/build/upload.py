"""Data sets made here and then brought into a bucket: the manifest last, since with it a data set exists."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from catgan.command import UserError
from catgan.location import filesystem, retry
from trainer.data.build.folder import LOCK
from trainer.data.build.progress import progress
from trainer.data.build.remote import Halted, stamp
from trainer.data.build.store import NAME, Store
from trainer.data.manifest import MANIFEST


def check(url: str) -> str:
    """``url`` as it is used from here on. Raises UserError if nothing can be written to such a URL."""
    filesystem(url)
    if url.startswith("http"):
        raise UserError(f"{url}: nothing can be written to a web server; give a path or a bucket (s3://, gs://, az://)")
    return url.rstrip("/")


def check_vacant(url: str, ours: Collection[str]) -> dict[str, tuple[int, str]]:
    """Whether there is nothing at ``url`` but what this build brought there before it was stopped, by name.

    Returns:
        Length and version of each object there, by name.

    Raises:
        UserError: there is.
        Halted: the bucket cannot be asked.
    """
    found = _found(url)
    if strangers := sorted(set(found) - set(ours)):
        raise UserError(f"{url} is not empty, it holds {strangers[0]}: give another OUT, or remove it first")
    return found


def upload(folder: Path, url: str, store: Store) -> None:
    """Bring the data set in ``folder`` to ``url``. What is there already, and unchanged, is not sent again.

    Raises:
        Halted: the bucket cannot be written, in spite of retries.
    """
    place, root = filesystem(url)
    known = store.uploads()
    found = check_vacant(url, known)  # again: the work may have taken hours
    paths = [path for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(NAME)]
    paths.sort(key=lambda path: (path.name == MANIFEST, path.suffix != ".tar", path.name))
    for path in progress(paths, "upload", "file", len(paths)):
        length, version = found.get(path.name, (None, None))
        if version is not None and version == known.get(path.name) and length == path.stat().st_size:
            continue
        store.set_upload(path.name, None)
        target = f"{root}/{path.name}"

        def send(path: Path = path, target: str = target) -> dict[str, Any]:
            place.put_file(str(path), target)
            return dict(place.info(target))

        try:
            sent = retry(send, f"{url}/{path.name}")
        except OSError as error:
            raise Halted(f"cannot write {url}/{path.name}: {error}") from None
        store.set_upload(path.name, stamp(sent))


def _found(url: str) -> dict[str, tuple[int, str]]:
    """Length and version of each object at ``url`` by its name from there on."""
    place, root = filesystem(url)
    try:
        found = retry(lambda: place.find(root, detail=True), url)
    except FileNotFoundError as error:
        raise UserError(f"cannot write {url}: {error}") from None
    except OSError as error:
        raise Halted(f"cannot look into {url}: {error}") from None
    return {path.removeprefix(root).lstrip("/"): (info["size"], stamp(info)) for path, info in found.items()}
