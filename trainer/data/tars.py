"""Tars that do not hide damage."""

from __future__ import annotations

import tarfile


class StrictInfo(tarfile.TarInfo):
    """tarfile takes garbage where a header should be for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from None
            raise
