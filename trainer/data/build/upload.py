"""Uploading a finished data set to a bucket. The manifest comes last: a data set exists once its manifest does."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from catgan.command import UserError
from catgan.dataset import MANIFEST
from catgan.location import filesystem, retry
from trainer.data.build.errors import ResumableError
from trainer.data.build.folder import LOCK
from trainer.data.build.progress import progress
from trainer.data.build.remote import version_of
from trainer.data.build.store import STORE_FILE, Store


def check_url(url: str) -> str:
    """``url`` without a final slash. Raises UserError if nothing can be written to such a URL."""
    filesystem(url)
    if url.startswith("http"):
        raise UserError(f"{url}: nothing can be written to a web server; give a path or a bucket (s3://, gs://, az://)")
    return url.rstrip("/")


def check_vacant(url: str, own: Collection[str]) -> dict[str, tuple[int, str]]:
    """Check that ``url`` holds nothing but objects named in ``own``, which an earlier run of this build uploaded.

    Returns:
        {name: (length in bytes, version)} of each object at ``url``.

    Raises:
        UserError: it holds something else, or its bucket does not exist.
        ResumableError: the bucket cannot be listed, in spite of retries.
    """
    found = _objects(url)
    if foreign := sorted(set(found) - set(own)):
        raise UserError(f"{url} is not empty, it holds {foreign[0]}: give another OUT, or remove it first")
    return found


def upload(folder: Path, url: str, store: Store) -> None:
    """Upload the data set in ``folder`` to ``url``, except what an earlier run uploaded and nobody has changed.

    Raises:
        ResumableError: the bucket cannot be written, in spite of retries.
    """
    fs, root = filesystem(url)
    known = store.uploads()
    found = check_vacant(url, known)  # again, because the build may have taken hours
    paths = [path for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(STORE_FILE)]
    paths.sort(key=lambda path: (path.name == MANIFEST, path.suffix != ".tar", path.name))
    for path in progress(paths, "upload", "file", len(paths)):
        length, version = found.get(path.name, (None, None))
        if version is not None and version == known.get(path.name) and length == path.stat().st_size:
            continue
        store.set_upload(path.name, None)
        target = f"{root}/{path.name}"

        def send(path: Path = path, target: str = target) -> dict[str, Any]:
            fs.put_file(str(path), target)
            return dict(fs.info(target))

        try:
            sent = retry(send, f"{url}/{path.name}")
        except OSError as error:
            raise ResumableError(f"cannot write {url}/{path.name}: {error}") from None
        store.set_upload(path.name, version_of(sent))


def _objects(url: str) -> dict[str, tuple[int, str]]:
    """{path from ``url`` on: (length in bytes, version)} of each object below ``url``."""
    fs, root = filesystem(url)
    try:
        found = retry(lambda: fs.find(root, detail=True), url)
    except FileNotFoundError as error:
        raise UserError(f"cannot write {url}: {error}") from None
    except OSError as error:
        raise ResumableError(f"cannot list {url}: {error}") from None
    return {path.removeprefix(root).lstrip("/"): (info["size"], version_of(info)) for path, info in found.items()}
