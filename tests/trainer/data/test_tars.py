"""Tars whose headers would stop their reader, or fill its memory."""

from __future__ import annotations

import gzip
import itertools
import tarfile
from pathlib import Path

import pytest

from catgan.command import UserError
from trainer.data.build.archives import in_tar
from trainer.data.build.members import Member
from trainer.data.build.sources import identify
from trainer.data.fetch import encoded_images

FIRST = tarfile.TarInfo("first.png").tobuf()
END = bytes(2 * tarfile.BLOCKSIZE)


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def members(path: Path) -> list[Member]:
    """At most five, since a reader that is caught yields the same ones for ever."""
    return list(itertools.islice(in_tar(str(path), "source", lambda *_: None), 5))


def resized(size: str) -> bytes:
    info = tarfile.TarInfo("second.png")
    info.pax_headers = {"size": size}
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("second", [header("second.png", tarfile.REGTYPE, -512), resized("-1536")])
def test_a_negative_length_does_not_lead_back_to_an_earlier_header(tmp_path: Path, second: bytes) -> None:
    path = tmp_path / "endless.tar"
    path.write_bytes(FIRST + second + END)
    first, problem = members(path)
    assert first.name == "source/first.png"
    assert problem.problem == "not readable: the tar is truncated or damaged, a negative length"
    with pytest.raises(tarfile.ReadError, match="a negative length"):
        list(itertools.islice(encoded_images(path.read_bytes()), 5))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [2**30, -512])
def test_a_long_extension_of_a_header_is_not_read(tmp_path: Path, kind: bytes, size: int) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(FIRST + header("extension", kind, size) + bytes(2**20)))
    first, problem = members(path)
    assert first.name == "source/first.png"
    expected = "an extended header of 1,073,741,824 bytes" if size > 0 else "a negative length"
    assert problem.problem == f"not readable: the tar is truncated or damaged, {expected}"


def sparse(**facts: str) -> bytes:
    info = tarfile.TarInfo("second.png")
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in facts.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "second",
    [
        header("second.png", tarfile.GNUTYPE_SPARSE, 0),
        sparse(size="1", numblocks="1", offset="0", numbytes="1"),
        sparse(map="0,1"),
        sparse(major="1", minor="0", name="second.png", realsize="1"),
    ],
    ids=["old", "0.0", "0.1", "1.0"],
)
def test_the_map_of_a_sparse_file_is_not_read(tmp_path: Path, second: bytes) -> None:
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(FIRST + second + END))
    first, problem = members(path)
    assert first.name == "source/first.png"
    assert "a sparse file: make the archive without tar's option --sparse" in problem.problem
    path.write_bytes(gzip.compress(second + END))
    with pytest.raises(UserError, match="cannot be read as zip or tar"):
        identify(str(path))


def test_a_long_name_within_reason_is_read(tmp_path: Path) -> None:
    name = "x" * 5000 + ".png"
    path = tmp_path / "long.tar"
    path.write_bytes(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT) + END)
    assert [member.name for member in members(path)] == [f"source/{name}"]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(FIRST + END)[:15],  # a download that broke off before its first member
        b"".join(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 0) for _ in range(2000)),  # each leads to the next
    ],
    ids=["truncated", "nothing but long names"],
)
def test_a_tar_without_a_readable_member_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cats.tar.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as zip or tar: get it again"):
        identify(path)
