"""A file of a source: its name, and how to read it."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from trainer.data.build.names import ARCHIVES, suffix
from trainer.data.images import ImageError
from trainer.data.reasons import reason_of

MAX_BYTES = 256 << 20
"""Longer files are rejected: a file must fit into memory, and a member of a zip can unpack to any length."""

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file, or a member of an archive, raises if it is damaged, encrypted or compressed in a rare way."""


@dataclass(frozen=True)
class Member:
    """A file of a source.

    Attributes:
        name: its path, beginning with the name of the source.
        length: in bytes.
        fetch: returns its content; None if it cannot be read.
        problem: why it cannot be read.
        version: changes when a file in a folder does; empty in archives, whose sources have a version.
    """

    name: str
    length: int = 0
    fetch: Callable[[], bytes] | None = None
    problem: str = ""
    version: str = ""

    def read(self) -> bytes:
        """The content. Raises ImageError with the reason if it cannot be read."""
        if self.fetch is None:
            raise ImageError(self.problem)
        if suffix(self.name) in ARCHIVES:
            raise ImageError("an archive: give it as a source of its own")
        if self.length > MAX_BYTES:
            raise ImageError(f"too large: {self.length:,} bytes, at most {MAX_BYTES:,}")
        try:
            return self.fetch()
        except (FileNotFoundError, PermissionError) as error:
            raise ImageError(f"not readable: {error.strerror or 'deleted, or no permission'}") from None
        except UNREADABLE as error:
            raise ImageError(f"not readable: {reason_of(error)}") from None
