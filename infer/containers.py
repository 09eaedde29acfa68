"""Where XMP packets are in PNG, JPEG, WebP, GIF and MP4 files.

Finds the packet of a file without decoding images, in constant memory, so that files from any source can be read, and
adds packets to GIF and MP4, which Pillow and PyAV cannot. The places are those of Adobe's "XMP Specification Part 3,
Storage in Files" (2016) and of the WebP container specification.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

MAX_XMP = 2**20  # bytes of a packet; this project's are below 64 KiB
MAX_PARTS = 4_000_000  # chunks, segments, blocks or boxes of a file; a second or two to skip

_PNG_KEYWORD = b"XML:com.adobe.xmp\0"
PNG_XMP = _PNG_KEYWORD + b"\0\0\0\0"  # what an iTXt chunk has before a packet: not compressed, in no language
_JPEG_NAME = b"http://ns.adobe.com/xap/1.0/\0"
_GIF_NAME = b"XMP DataXMP"
# A GIF reader that takes the packet's bytes for block lengths lands in here, and from everywhere at the last byte.
_GIF_TRAILER = bytes([1, *range(255, -1, -1), 0])
_GIF_LOOP = b"\x21\xff\x0bNETSCAPE2.0\x03\x01"
_MP4_UUID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")


class DamagedError(ValueError):
    """The file does not follow its format, or holds more than it may; the text says what is wrong."""


def gif_with_xmp(gif: bytes, packet: bytes) -> bytes:
    """The file ``gif`` with an application extension that holds ``packet`` (UTF-8 without NUL), before the images."""
    assert gif[:3] == b"GIF", gif[:6]
    assert b"\0" not in packet, "would end the block"
    position = 13 + _colours(gif[10])
    if gif.startswith(_GIF_LOOP, position):  # browsers expect it first
        position += 19
    extension = b"\x21\xff\x0b" + _GIF_NAME + packet + _GIF_TRAILER
    return b"GIF89a" + gif[6:position] + extension + gif[position:]


def mp4_box(packet: bytes) -> bytes:
    """A box with ``packet``, to be appended to an MP4 file."""
    return struct.pack(">I4s", 24 + len(packet), b"uuid") + _MP4_UUID + packet


def file_format(start: bytes) -> str | None:
    """The format of a file whose first 12 bytes are given: "png", "jpeg", "webp", "gif", "mp4", or None."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return "mp4" if start[4:8] == b"ftyp" else None


def find_xmp(file: BinaryIO, kind: str) -> bytes | None:
    """The XMP packet in a file of the format ``kind``, see ``file_format``; None if there is none.

    Raises:
        DamagedError: the file does not follow its format, or is too large.
    """
    return _FINDERS[kind](_Reader(file))


class _Reader:
    """Reads and skips from the start of a file; raises ``DamagedError`` at its end and after ``MAX_PARTS`` parts.

    ``left`` is the number of bytes after the current position.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = file.seek(0, os.SEEK_END)
        self._parts = 0
        file.seek(0)

    def part(self) -> None:
        """Count a part."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise DamagedError(f"has more than {MAX_PARTS:,} parts")

    def read(self, count: int) -> bytes:
        self._take(count)
        data = self._file.read(count)
        if len(data) < count:
            raise DamagedError("is cut short")
        return data

    def skip(self, count: int) -> None:
        self._take(count)
        self._file.seek(count, os.SEEK_CUR)

    def packet(self, count: int) -> bytes:
        """Read a packet of ``count`` bytes."""
        if count > MAX_XMP:
            raise DamagedError(f"holds {count:,} bytes of XMP, more than {MAX_XMP:,}")
        return self.read(count)

    def _take(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise DamagedError("is cut short")
        self.left -= count


def _png(reader: _Reader) -> bytes | None:
    reader.skip(8)
    while True:
        reader.part()
        length, kind = struct.unpack(">I4s", reader.read(8))
        if kind == b"IEND":
            return None
        if kind != b"iTXt" or length < len(_PNG_KEYWORD):
            reader.skip(length + 4)
            continue
        keyword = reader.read(len(_PNG_KEYWORD))
        if keyword != _PNG_KEYWORD:
            reader.skip(length - len(_PNG_KEYWORD) + 4)
            continue
        content = reader.packet(length - len(_PNG_KEYWORD))
        if reader.read(4) != struct.pack(">I", zlib.crc32(kind + keyword + content)):
            raise DamagedError("has a checksum that does not fit its metadata")
        return _international_text(content)


def _international_text(content: bytes) -> bytes:
    """The text of an iTXt chunk after its keyword: compression flag and method, language, translated keyword, text."""
    parts = content[2:].split(b"\0", 2)
    if len(parts) < 3:
        raise DamagedError("has incomplete metadata")
    if content[0] == 0:
        return parts[2]
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(parts[2], MAX_XMP + 1)
    except zlib.error as error:
        raise DamagedError(f"has metadata that cannot be decompressed ({error})") from error
    if len(text) > MAX_XMP:
        raise DamagedError(f"holds more than {MAX_XMP:,} bytes of XMP")
    return text


def _jpeg(reader: _Reader) -> bytes | None:
    reader.skip(2)
    while True:
        reader.part()
        start, marker = reader.read(2)
        if start != 0xFF:
            raise DamagedError("has no marker where a segment should begin")
        while marker == 0xFF:  # padding
            reader.part()
            (marker,) = reader.read(1)
        if marker in (0xDA, 0xD9):  # the image itself, or the end
            return None
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # without content
            continue
        length = struct.unpack(">H", reader.read(2))[0] - 2
        if marker == 0xE1 and length >= len(_JPEG_NAME):
            content = reader.read(length)
            if content.startswith(_JPEG_NAME):
                return content[len(_JPEG_NAME) :]
        else:
            reader.skip(length)


def _webp(reader: _Reader) -> bytes | None:
    reader.skip(12)
    while reader.left:
        reader.part()
        kind, length = struct.unpack("<4sI", reader.read(8))
        if kind == b"XMP ":
            return reader.packet(length)
        reader.skip(length)
        if length % 2 and reader.left:
            reader.skip(1)
    return None


def _gif(reader: _Reader) -> bytes | None:
    reader.skip(10)
    (flags,) = reader.read(1)
    reader.skip(2 + _colours(flags))
    while (kind := reader.read(1)) != b";":
        reader.part()
        if kind == b",":  # an image
            flags = reader.read(9)[8]
            reader.skip(_colours(flags) + 1)
        elif kind == b"!":
            label, length = reader.read(2)
            name = reader.read(length)
            if label == 0xFF and name == _GIF_NAME:
                return _gif_packet(reader)
            if length == 0:
                continue
        else:
            raise DamagedError("has no block where one should begin")
        while length := reader.read(1)[0]:
            reader.part()
            reader.skip(length)
    return None


def _colours(flags: int) -> int:
    """Bytes of the colour table that a GIF's flags announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_packet(reader: _Reader) -> bytes:
    """The packet of an application extension: all bytes up to the trailer, or of writers without it the blocks."""
    raw, blocks = io.BytesIO(), io.BytesIO()
    while length := reader.read(1):
        content = reader.read(length[0])
        raw.write(length + content)
        blocks.write(content)
        if raw.tell() > MAX_XMP + len(_GIF_TRAILER):
            raise DamagedError(f"holds more than {MAX_XMP:,} bytes of XMP")
        if not content:
            break
    data = raw.getvalue()
    return data.removesuffix(_GIF_TRAILER) if data.endswith(_GIF_TRAILER) else blocks.getvalue()


def _mp4(reader: _Reader) -> bytes | None:
    while reader.left:
        reader.part()
        length, kind = struct.unpack(">I4s", reader.read(8))
        if length == 1:  # 64 bits follow
            length = struct.unpack(">Q", reader.read(8))[0] - 16
        elif length == 0:  # to the end of the file
            length = reader.left
        else:
            length -= 8
        if kind == b"uuid" and length >= 16:
            if reader.read(16) == _MP4_UUID:
                return reader.packet(length - 16)
            length -= 16
        reader.skip(length)
    return None


_FINDERS: dict[str, Callable[[_Reader], bytes | None]] = {
    "png": _png,
    "jpeg": _jpeg,
    "webp": _webp,
    "gif": _gif,
    "mp4": _mp4,
}
