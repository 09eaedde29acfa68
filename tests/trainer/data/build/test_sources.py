from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from catgan.command import UserError
from trainer.data.build import members, sources
from trainer.data.build.shards import write_shards
from trainer.data.images import ImageError

FILES = {"b.jpg": b"B", "a.png": b"A", "deep/er/c.webp": b"C" * 1000, "no suffix": b"N"}
IGNORED = {
    "notes.txt": b"t",
    "a.json": b"{}",
    "T.CSV": b"",
    "deep/README.md": b"",
    ".hidden.jpg": b"h",
    ".git/d.jpg": b"g",
    "__MACOSX/._a.png": b"m",
    "deep/.DS_Store": b"",
}


def make_folder(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("deep")
        for name, data in files.items():
            archive.writestr(name, data)


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.addfile(member("deep", type=tarfile.DIRTYPE))
        for name, data in files.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))


def contents(path: Path) -> dict[str, bytes | str]:
    """The members of a source by name: the content, or the problem."""
    found: dict[str, bytes | str] = {}
    for one in sources.identify(path).members():
        assert one.name not in found
        try:
            found[one.name] = one.read()
        except ImageError as error:
            found[one.name] = str(error)
    return found


@pytest.mark.parametrize(
    ("name", "make", "countable"),
    [
        ("set", make_folder, True),
        ("set.zip", make_zip, True),
        ("set.tar", make_tar, True),
        ("set.tar.gz", lambda path, files: make_tar(path, files, "w:gz"), False),
        ("set.tar.bz2", lambda path, files: make_tar(path, files, "w:bz2"), False),
        ("set.tar.xz", lambda path, files: make_tar(path, files, "w:xz"), False),
        ("misnamed.dat", make_zip, True),
        ("misnamed.jpg", make_tar, True),
    ],
)
def test_each_kind_of_source(
    tmp_path: Path, name: str, make: Callable[[Path, dict[str, bytes]], None], countable: bool
) -> None:
    make(tmp_path / name, FILES | IGNORED)
    assert contents(tmp_path / name) == {f"{name}/{file}": data for file, data in FILES.items()}
    assert sources.identify(tmp_path / name).count() == (len(FILES) if countable else None)


def test_folders_are_listed_in_order(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", FILES)
    assert list(contents(tmp_path / "set")) == [f"set/{n}" for n in ("a.png", "b.jpg", "no suffix", "deep/er/c.webp")]


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"meow")
    assert contents(tmp_path / "cat.jpg") == {"cat.jpg": b"meow"}
    assert sources.identify(tmp_path / "cat.jpg").count() == 1


def test_data_set_made_before(tmp_path: Path) -> None:
    pixels = (np.full((8, 8, 3), i, np.uint8) for i in range(20))
    write_shards(tmp_path / "set", ((p, {}) for p in pixels), size=8)
    found = contents(tmp_path / "set")
    assert len(found) == sources.identify(tmp_path / "set").count() == 20, "no contact sheet, manifest or JSON"
    assert "set/train-000000.tar/00000000.webp" in found
    assert "set/val-000000.tar/00000018.webp" in found
    assert set(contents(tmp_path / "set" / "val-000000.tar")) == {f"val-000000.tar/000000{i}.webp" for i in (18, 19)}


def test_paths_outside_the_archive_do_no_harm(tmp_path: Path) -> None:
    files = {"../../evil.jpg": b"1", "/etc/evil.jpg": b"2", "a/../../b.jpg": b"3"}
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in" / "set.tar", files)
    make_zip(tmp_path / "in" / "set.zip", files)
    before = sorted(tmp_path.rglob("*"))
    for name in ("set.tar", "set.zip"):
        assert sorted(map(bytes, contents(tmp_path / "in" / name).values())) == [b"1", b"2", b"3"]  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


def test_links_out_of_a_tar_and_devices_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.addfile(member("real.jpg", size=1), io.BytesIO(b"R"))
        tar.addfile(member("soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(member("hard.jpg", type=tarfile.LNKTYPE, linkname="/etc/hosts"))
        tar.addfile(member("null.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3))
    assert contents(tmp_path / "set.tar") == {
        "set.tar/real.jpg": b"R",
        "set.tar/soft.jpg": "not a file: a link out of the archive",
        "set.tar/hard.jpg": "not a file: a link to etc/hosts, which is no file in the archive",
        "set.tar/null.jpg": "not a file",
    }


def test_links_and_pipes_in_a_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", {"a.jpg": b"A", "sub/b.jpg": b"B"})
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    assert contents(tmp_path / "set") == {
        "set/a.jpg": b"A",
        "set/link.jpg": b"A",
        "set/sub/b.jpg": b"B",
        "set/dangling.jpg": "not readable: No such file or directory",
        "set/pipe.jpg": "not a file",
        "set/loop": "a link to a folder: give it as a source of its own",
    }


def test_archives_inside_sources_are_listed_not_opened(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", {"more.zip": b"PK", "a.jpg": b"A"})
    found = contents(tmp_path / "set")
    assert found["set/a.jpg"] == b"A"
    assert str(found["set/more.zip"]).startswith("an archive")
    make_zip(tmp_path / "last.zip", FILES)
    make_tar(tmp_path / "set.tar", {"a.jpg": b"A", "last.zip": (tmp_path / "last.zip").read_bytes()})
    assert list(contents(tmp_path / "set.tar")) == ["set.tar/a.jpg", "set.tar/last.zip"]


def test_huge_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_BYTES", 100)
    for name, make in (("set", make_folder), ("set.zip", make_zip), ("set.tar", make_tar)):
        make(tmp_path / name, {"a.jpg": b"a" * 100, "b.jpg": b"b" * 101})
        found = contents(tmp_path / name)
        assert found[f"{name}/a.jpg"] == b"a" * 100
        assert found[f"{name}/b.jpg"] == "too large: 101 bytes, at most 100"


def test_damaged_member_of_a_zip_does_not_affect_others(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            archive.writestr(name, name.encode() * 50)
    data = bytearray(path.read_bytes())
    data[data.index(b"b.jpgb.jpg") + 20] ^= 255
    path.write_bytes(data)
    found = contents(path)
    assert found["set.zip/a.jpg"] == b"a.jpg" * 50
    assert found["set.zip/c.jpg"] == b"c.jpg" * 50
    assert "CRC" in str(found["set.zip/b.jpg"])


def test_encrypted_member_of_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    make_zip(path, {"a.jpg": b"A" * 50})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag in the header and in the directory
        start = data.rindex(signature)
        data[start + offset] |= 1
    path.write_bytes(data)
    reason = "not readable: File is encrypted, password required for extraction"
    assert str(contents(path)["set.zip/a.jpg"]) == reason


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_truncated_tar_gives_its_first_members_and_the_problem(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "set.tar"
    rng = np.random.default_rng(0)
    files = {f"{i}.jpg": rng.bytes(20_000) for i in range(5)}
    make_tar(path, files, mode)
    path.write_bytes(path.read_bytes()[:50_000])
    found = contents(path)
    assert found["set.tar/0.jpg"] == files["0.jpg"]
    assert "set.tar/4.jpg" not in found
    assert "truncated or damaged" in str(found["set.tar"])


def test_garbage_between_members_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    make_tar(path, {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"C"})
    data = bytearray(path.read_bytes())
    start = data.index(b"b.jpg")
    data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    found = contents(path)
    assert found["set.tar/a.jpg"] == b"A"
    assert "truncated or damaged" in str(found["set.tar"])


def test_members_of_a_large_tar_do_not_stay_in_memory(tmp_path: Path) -> None:
    make_tar(tmp_path / "set.tar", {f"{i}.jpg": b"" for i in range(50)})
    listed = list(sources.identify(tmp_path / "set.tar").members())
    assert len(listed) == 50
    assert listed[-1].fetch is not None
    tar = listed[-1].fetch.args[0]  # type: ignore[attr-defined]
    assert len(tar.members) <= 1


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing at .*none: give a folder, zip, tar or image"):
        sources.identify(tmp_path / "none")
    with pytest.raises(UserError, match="give a path, or a URL that begins with"):
        sources.identify("pipe:cat cats.zip")


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tar.gz", "set.rar", "set.7z"])
def test_files_with_an_archives_suffix_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="cannot be read as zip or tar"):
        sources.identify(tmp_path / name)
