"""Tar files, read strictly."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from typing import IO, NoReturn

_MAX_EXTENSION = 1 << 20  # bytes of a header's extension: a long name, or attributes
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class StrictInfo(tarfile.TarInfo):
    """Raises ReadError for what tarfile would trust: a damaged header, which it takes for the end of the archive; a
    negative length, with which it reads the same headers for ever; an extension of any length, and the map of a sparse
    file, which it reads into memory, where some hundred kilobytes of a compressed tar become gigabytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from None
            raise
        if info.type == tarfile.GNUTYPE_SPARSE:
            _refuse_sparse()
        if info.type in _EXTENSIONS and info.size > _MAX_EXTENSION:
            raise tarfile.ReadError(f"an extended header of {info.size:,} bytes")
        return _checked(info)

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictInfo:
        return _checked(super().fromtarfile(tar))  # an extension can change the length

    # tarfile calls these for sparse files in the formats 0.0, 0.1 and 1.0 of GNU tar with pax headers.

    def _proc_gnusparse_00(self, *_: object) -> NoReturn:
        _refuse_sparse()

    def _proc_gnusparse_01(self, *_: object) -> NoReturn:
        _refuse_sparse()

    def _proc_gnusparse_10(self, *_: object) -> NoReturn:
        _refuse_sparse()


def _refuse_sparse() -> NoReturn:
    raise tarfile.ReadError("a sparse file: make the archive without tar's option --sparse")


def _checked(info: StrictInfo) -> StrictInfo:
    if info.size < 0:
        raise tarfile.ReadError("a negative length")
    return info


def is_tar(file: IO[bytes], mode: str = "r:*") -> bool:
    """Whether ``file`` begins with a member of a tar that ``mode`` opens, by default one that may be compressed."""
    try:
        tarfile.open(fileobj=file, mode=mode, tarinfo=StrictInfo).close()  # type: ignore[call-overload]
    except (tarfile.TarError, EOFError, RecursionError, lzma.LZMAError, zlib.error):
        return False
    return True
