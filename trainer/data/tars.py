"""Tar files, read strictly."""

from __future__ import annotations

import tarfile


class StrictInfo(tarfile.TarInfo):
    """Raises ReadError for a damaged header, which tarfile would take for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from None
            raise
