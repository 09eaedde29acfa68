"""Archives of other systems: names, links, and folders in them that this project's commands wrote."""

from __future__ import annotations

import io
import stat
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.trainer.data.build.test_sources import contents, make_folder, member
from trainer.data.build import archives, sources
from trainer.data.build.labels import Labels
from trainer.data.build.names import link_target, member_name

RUN = {
    "config.json": b"{}",
    "metrics.jsonl": b"",
    "reals.png": b"sheet",
    "samples/fakes_000000kimg.png": b"sheet",
    "best/samples.png": b"sheet",
    "best/gen.onnx": b"onnx",
    "checkpoint_000000000064/state.pt": b"state",
}
DATA_SET = {"contact.png": b"sheet", "manifest.json": b"{}", "rejected.png": b"sheet", "train-000000.tar": b"tar"}
PHOTOS = {"a.jpg": b"A", "contact.png": b"mine", "samples/b.jpg": b"B", "best/c.jpg": b"C"}


def make_zip(path: Path, files: Mapping[str, bytes], system: int = 3) -> Path:
    """A zip whose names are exactly these bytes; 0 is the ``system`` of MS-DOS and Windows, 3 of Unix."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, system
            archive.writestr(info, data)
    return path


def make_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
    return path


Entry = tuple[str, bytes, str | bytes]
"""Of a tar: name, type, content or target."""


def make_linked_tar(path: Path, entries: list[Entry], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, kind, value in entries:
            if isinstance(value, bytes):
                tar.addfile(member(name, type=kind, size=len(value)), io.BytesIO(value))
            else:
                tar.addfile(member(name, type=kind, linkname=value))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pets/cat/0.png", "pets/cat/0.png"),
        ("pets\\cat\\0.png", "pets/cat/0.png"),
        ("pets/cat\\0.png", "pets/cat/0.png"),
        ("./pets//cat/./0.png", "pets/cat/0.png"),
        ("/pets/cat/0.png", "pets/cat/0.png"),
        ("C:\\pets\\0.png", "pets/0.png"),
        ("c:/pets/0.png", "pets/0.png"),
        ("\\\\?\\D:\\pets\\0.png", "pets/0.png"),
        ("\\\\server\\pets\\0.png", "server/pets/0.png"),
        ("..\\..\\cat/0.png", "cat/0.png"),
        ("pets/../../cat\\..\\0.png", "0.png"),
        ("a:b.png", "a:b.png"),
        ("...", "..."),
    ],
)
def test_a_members_name_is_a_path_below_the_archive(name: str, expected: str) -> None:
    assert member_name(name) == expected


@pytest.mark.parametrize(
    ("link", "target", "expected"),
    [
        ("cat/0.png", "1.png", "cat/1.png"),
        ("cat/0.png", "../all\\1.png", "all/1.png"),
        ("cat/0.png", "./../cat/./1.png", "cat/1.png"),
        ("cat/0.png", "../../1.png", None),
        ("cat/0.png", "..\\..\\1.png", None),
        ("cat/0.png", "/cat/1.png", None),
        ("cat/0.png", "C:\\cat\\1.png", None),
    ],
)
def test_target_of_a_symbolic_link(link: str, target: str, expected: str | None) -> None:
    assert link_target(link, target) == expected


@pytest.mark.parametrize("make", [make_zip, lambda path, files: make_zip(path, files, 0), make_tar])
def test_archives_made_on_windows(tmp_path: Path, make: Callable[[Path, Mapping[str, bytes]], Path]) -> None:
    files = {
        "pets\\": b"",
        "pets\\cat\\": b"",
        "pets\\cat\\0.png": b"cat",
        "pets/dog\\0.png": b"dog",
        ".\\loose.png": b"loose",
        "..\\..\\Windows\\0.png": b"climbs",
        "C:\\pets\\cat\\1.png": b"drive",
        "pets\\__MACOSX\\._0.png": b"m",
        "pets\\.hidden\\x.png": b"h",
        "pets\\cat\\notes.txt": b"t",
    }
    path = make(tmp_path / "in", files)
    assert contents(path) == {
        "in/pets/cat/0.png": b"cat",
        "in/pets/dog/0.png": b"dog",
        "in/loose.png": b"loose",
        "in/Windows/0.png": b"climbs",
        "in/pets/cat/1.png": b"drive",
    }
    labels = Labels("folder")
    found = {one.name: labels.of(one.name, "zip") for one in sources.identify(path).members()}
    assert list(found.values()) == ["cat", "dog", None, "Windows", "cat"]


def test_folder_that_a_zip_made_on_windows_was_unpacked_to(tmp_path: Path) -> None:
    """Python, for one, unpacks such names as they are. Those in rejected.csv are the names on disk."""
    make_folder(tmp_path / "in", {"pets\\cat\\0.png": b"cat", "pets\\__MACOSX\\._0.png": b"m", "pets\\.h\\0.png": b"h"})
    assert contents(tmp_path / "in") == {"in/pets\\cat\\0.png": b"cat"}
    assert Labels("folder").of("in/pets\\cat\\0.png", "folder") == "cat"


def test_names_in_a_zip_of_macos_are_utf_8_without_saying_so(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFD", "kätzchen/猫.png").encode(), b"k\x84tzchen.png"]
    stand_ins = [bytes([65 + i]) * len(name) for i, name in enumerate(names)]
    data = make_zip(tmp_path / "set.zip", {name.decode(): b"" for name in stand_ins}).read_bytes()
    for stand_in, name in zip(stand_ins, names, strict=True):
        data = data.replace(stand_in, name)
    (tmp_path / "set.zip").write_bytes(data)
    assert list(contents(tmp_path / "set.zip")) == [f"set.zip/{names[0].decode()}", "set.zip/kätzchen.png"]


LINKS: list[Entry] = [
    ("fluffy/forward.png", tarfile.LNKTYPE, "cat/0.png"),
    ("cat/0.png", tarfile.REGTYPE, b"0"),
    ("cat/1.png", tarfile.REGTYPE, b"1"),
    ("cat/0.png", tarfile.LNKTYPE, "cat/0.png"),  # as GNU tar writes a file that was named twice
    ("fluffy/hard.png", tarfile.LNKTYPE, "./cat\\1.png"),
    ("fluffy/soft.png", tarfile.SYMTYPE, "../cat/1.png"),
    ("fluffy/chained.png", tarfile.SYMTYPE, "hard.png"),
    ("fluffy/of hidden.png", tarfile.LNKTYPE, ".store/9"),
    (".store/9", tarfile.REGTYPE, b"9"),
    ("fluffy/absolute.png", tarfile.LNKTYPE, "/cat/1.png"),
    ("fluffy/notes.txt", tarfile.LNKTYPE, "cat/1.png"),
]
BROKEN: list[Entry] = [
    ("loop/a.png", tarfile.SYMTYPE, "b.png"),
    ("loop/b.png", tarfile.SYMTYPE, "a.png"),
    ("out/soft.png", tarfile.SYMTYPE, "../../etc/passwd"),
    ("out/root.png", tarfile.SYMTYPE, "/etc/passwd"),
    ("out/hard.png", tarfile.LNKTYPE, "../../etc/passwd"),
    ("out/folder", tarfile.SYMTYPE, "../cat"),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_links_in_a_tar_give_the_content_of_their_targets(tmp_path: Path, mode: str) -> None:
    path = make_linked_tar(tmp_path / "set.tar", LINKS + BROKEN, mode)
    no_file = "not a file: a link to {}, which is no file in the archive"
    assert contents(path) == {
        "set.tar/cat/0.png": b"0",
        "set.tar/cat/1.png": b"1",
        "set.tar/fluffy/forward.png": b"0",
        "set.tar/fluffy/hard.png": b"1",
        "set.tar/fluffy/soft.png": b"1",
        "set.tar/fluffy/chained.png": b"1",
        "set.tar/fluffy/of hidden.png": b"9",
        "set.tar/fluffy/absolute.png": b"1",
        "set.tar/loop/a.png": no_file.format("loop/a.png"),
        "set.tar/loop/b.png": no_file.format("loop/b.png"),
        "set.tar/out/soft.png": "not a file: a link out of the archive",
        "set.tar/out/root.png": "not a file: a link out of the archive",
        "set.tar/out/hard.png": no_file.format("etc/passwd"),
        "set.tar/out/folder": no_file.format("cat"),
    }


def test_links_of_a_truncated_tar(tmp_path: Path) -> None:
    entries: list[Entry] = [
        ("a.png", tarfile.REGTYPE, b"A"),
        ("b.png", tarfile.LNKTYPE, "a.png"),
        ("c.png", tarfile.REGTYPE, bytes(9999)),
    ]
    path = make_linked_tar(tmp_path / "set.tar", entries)
    path.write_bytes(path.read_bytes()[:3000])
    found = contents(path)
    assert (found["set.tar/a.png"], found["set.tar/b.png"]) == (b"A", b"A")
    assert "truncated or damaged" in str(found["set.tar"])


def test_a_target_is_read_once_for_all_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step back in a compressed tar would read it from its beginning."""
    entries: list[Entry] = [(f"{i}.png", tarfile.REGTYPE, b"%d" % i) for i in range(20)]
    entries += [(f"link {i}.png", tarfile.LNKTYPE, f"{i % 10}.png") for i in range(40)]
    path = make_linked_tar(tmp_path / "set.tar.gz", entries, "w:gz")
    extracted = []
    original = archives._extract
    monkeypatch.setattr(archives, "_extract", lambda *found: extracted.append(found[1].name) or original(*found))
    assert len(contents(path)) == 60
    assert extracted == [f"{i}.png" for i in (*range(20), *range(10))]


def test_links_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("cat/0.png", b"0")
        targets = {
            "soft": "../cat/0.png",
            "chained": "soft.png",
            "out": "../../0.png",
            "root": "/etc/passwd",
            "loop": "loop.png",
        }
        for name, target in {**targets, "gone": "none.png", "long": "x" * 5000}.items():
            info = zipfile.ZipInfo(f"fluffy/{name}.png")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    no_file = "not a file: a link to {}, which is no file in the archive"
    found = contents(tmp_path / "set.zip")
    assert {name.removeprefix("set.zip/"): value for name, value in found.items()} == {
        "cat/0.png": b"0",
        "fluffy/soft.png": b"0",
        "fluffy/chained.png": b"0",
        "fluffy/out.png": "not a file: a link out of the archive",
        "fluffy/root.png": "not a file: a link out of the archive",
        "fluffy/loop.png": no_file.format("fluffy/loop.png"),
        "fluffy/gone.png": no_file.format("fluffy/none.png"),
        "fluffy/long.png": "not a file: a link without a path",
    }


@pytest.mark.parametrize("make", [make_folder, make_zip, make_tar])
def test_files_that_this_projects_commands_wrote_are_passed_over(
    tmp_path: Path, make: Callable[[Path, Mapping[str, bytes]], object]
) -> None:
    """In archives the files that show whose they are may come last."""
    own = {f"runs/a/{name}": data for name, data in reversed(RUN.items())} | {
        f"shards/{name}": data for name, data in DATA_SET.items()
    }
    make(tmp_path / "in", own | PHOTOS | {"runs/a/cat.jpg": b"cat"})
    source = sources.identify(tmp_path / "in")
    found = {one.name: one.read() for one in source.members()}
    assert found == {f"in/{name}": data for name, data in (PHOTOS | {"runs/a/cat.jpg": b"cat"}).items()}
    assert source.own == {"in/runs/a": "training run", "in/shards": "data set"}
    assert source.count() == len(found)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_long_chain_of_links_is_not_followed(tmp_path: Path, kind: str) -> None:
    chain = 3000
    path = tmp_path / f"chain.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("0000.png", b"cat")
            for i in range(1, chain):
                link = zipfile.ZipInfo(f"{i:04d}.png")
                link.create_system, link.external_attr = 3, 0o120777 << 16
                archive.writestr(link, f"{i - 1:04d}.png")
    else:
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo("0000.png"), io.BytesIO())
            for i in range(1, chain):
                info = tarfile.TarInfo(f"{i:04d}.png")
                info.type, info.linkname = tarfile.SYMTYPE, f"{i - 1:04d}.png"
                tar.addfile(info)
    began = time.process_time()
    problems = [
        bool(member.problem) for member in sorted(sources.identify(path).members(), key=lambda member: member.name)
    ]
    assert time.process_time() - began < 10
    assert problems == [False] * 41 + [True] * (chain - 41)
