from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from trainer.data.reasons import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("image file is truncated (7 bytes not processed)"), "image file is truncated (7 bytes not processed)"),
        (OSError(5, "Input/output error", "/home/me/a.png"), "Input/output error"),
        (SyntaxError("broken PNG file (bad header checksum in b'IDAT')"), "broken PNG file"),
        (SyntaxError(r"broken PNG file (chunk b'\x00(\'\xff)')"), "broken PNG file"),
        (ValueError(b"Token too long in file header: 12"), "damaged"),
        (ValueError("line 1\n  line 2"), "line 1 line 2"),
        (ValueError("x" * 500), "x" * 100),
        (ValueError("cannot read s3://bucket/a.png?signature=secret"), "cannot read s3://bucket/a.png"),
        (Image.UnidentifiedImageError(f"cannot identify image file {io.BytesIO()!r}"), "cannot identify image file"),
        (struct.error("unpack requires a buffer of 4 bytes"), "damaged"),
        (AttributeError("'NoneType' object has no attribute 'seek'"), "damaged"),
        (KeyError("name"), "damaged"),
        (AssertionError(), "damaged"),
        (MemoryError(), "not enough memory"),
        (EOFError(), "damaged"),
    ],
)
def test_what_exceptions_say(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_what_python_says_of_values() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int(b"1\xff")
    assert reason_of(caught.value) == "damaged"


def test_members_of_archives_are_not_shown_as_objects(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a > b.png", b"x")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(header) + flags] |= 1  # encrypted
    with zipfile.ZipFile(io.BytesIO(data)) as archive, pytest.raises(RuntimeError) as caught:
        archive.read(archive.infolist()[0])
    assert "<ZipInfo" in str(caught.value)
    assert reason_of(caught.value) == "File is encrypted, password required for extraction"
