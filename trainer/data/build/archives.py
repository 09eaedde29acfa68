"""The members of zips and tars.

Links are followed within the archive only: a link gives the content of the file that it leads to, under its own name.
Files of data sets and runs in an archive are skipped.
"""

from __future__ import annotations

import functools
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from catgan.outputs import OwnFiles
from trainer.data.build import remote
from trainer.data.build.members import UNREADABLE, Member
from trainer.data.build.names import is_listed, link_target, member_name
from trainer.data.reasons import reason_of
from trainer.data.tars import StrictInfo, is_tar

_MAX_LINK = 4096  # bytes: a longer content is no path
_MAX_LINKS = 40  # from one to the next, as in Linux: each link of a long chain would be followed to its end
_UTF_8 = 1 << 11  # a zip's flag for names in UTF-8
_MSDOS_FOLDER = 1 << 4
_UNIX = 3

OnOwn = Callable[[str, str], object]
"""Called with the path and the kind of a folder whose files are skipped, see ``outputs.OwnFiles``."""


def in_zip(location: str, name: str, on_own: OnOwn) -> Iterator[Member]:
    """The members of the zip at ``location``, a path or a URL, in its order; ``name`` begins their names."""
    try:
        with remote.open_file(location) as file, zipfile.ZipFile(file) as archive:
            paths = {info: path for info in archive.infolist() if (path := _path_in_zip(info))}
            own = OwnFiles()
            candidates = {path for path in paths.values() if own.note(path)}
            files = {path: info for info, path in paths.items()}
            for info, path in paths.items():
                if not is_listed(path):
                    continue
                if path in candidates and (found := own.owner(path)):
                    on_own(*found)
                elif _is_link(info):
                    yield _linked_in_zip(archive, files, path, f"{name}/{path}")
                else:
                    yield Member(f"{name}/{path}", info.file_size, functools.partial(archive.read, info))
    except UNREADABLE as error:
        yield Member(name, problem=f"not readable: {reason_of(error)}")


def _path_in_zip(info: zipfile.ZipInfo) -> str:
    """The path of a member; "" for a folder."""
    name = info.filename
    if not info.flag_bits & _UTF_8:
        with suppress(UnicodeError):  # macOS writes UTF-8 without the flag, and zipfile decodes it as code page 437
            name = name.encode("cp437").decode()
    if name.endswith(("/", "\\")) or (info.external_attr & _MSDOS_FOLDER and not info.file_size):
        return ""
    return member_name(name)


def _is_link(info: zipfile.ZipInfo) -> bool:
    return info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16)


def _linked_in_zip(archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], path: str, name: str) -> Member:
    """The member ``name`` with the content of the file that the link at ``path`` leads to."""
    seen = set()
    try:
        while _is_link(info := files[path]):
            seen.add(path)
            if info.file_size > _MAX_LINK:
                return Member(name, problem="not a file: a link without a path")
            target = link_target(path, archive.read(info).decode("utf-8", "surrogateescape"))
            if target is None or target not in files or target in seen or len(seen) > _MAX_LINKS:
                return Member(name, problem=_broken(target))
            path = target
    except UNREADABLE as error:
        return Member(name, problem=f"not readable: {reason_of(error)}")
    return Member(name, info.file_size, functools.partial(archive.read, info))


def _broken(target: str | None) -> str:
    """Why a link to ``target`` in the archive, or out of it (None), cannot be read."""
    if target is None:
        return "not a file: a link out of the archive"
    return f"not a file: a link to {target or 'a folder'}, which is no file in the archive"


def in_tar(location: str, name: str, on_own: OnOwn) -> Iterator[Member]:
    """The members of the tar at ``location``, a path or a URL; ``name`` begins their names.

    Links, and files that may belong to a data set or a run, are known only when the whole tar has been read: they come
    last, from a second pass. Each member must be read before the next one is requested.
    """
    own = OwnFiles()
    held: set[str] = set()  # paths of files that may be ours
    links: dict[str, str | None] = {}  # {path: path of the target, None outside the archive}
    damage = None
    try:
        for tar, info, path in _entries(location):
            may_be_own = own.note(path)
            if not is_listed(path):
                continue
            if info.islnk():
                if (target := member_name(info.linkname)) != path:  # a file that was packed twice links to itself
                    links[path] = target
            elif info.issym():
                links[path] = link_target(path, info.linkname)
            elif may_be_own:
                held.add(path)
            else:
                yield _member(tar, info, f"{name}/{path}")
    except UNREADABLE as error:
        damage = Member(name, problem=f"not readable: the tar is truncated or damaged, {reason_of(error)}")
    for path in sorted({*held, *links}):
        if found := own.owner(path):
            on_own(*found)
            held.discard(path)
            links.pop(path, None)
    yield from _second_pass(location, name, held, links)
    if damage:
        yield damage


def _second_pass(location: str, name: str, held: Collection[str], links: Mapping[str, str | None]) -> Iterator[Member]:
    """The members at the paths ``held``, and ``links`` with the content of their targets."""
    wanted: dict[str | None, list[str]] = {}
    for path in links:
        wanted.setdefault(_end(links, path), []).append(path)
    if held or any(wanted):
        with suppress(*UNREADABLE):  # reported by the first pass
            for tar, info, path in _entries(location):
                if path in held:
                    yield _member(tar, info, f"{name}/{path}")
                if path in wanted and info.isreg():
                    # A compressed tar would be read from its beginning for each link.
                    content = functools.cache(functools.partial(_extract, tar, info))
                    for link in wanted.pop(path):
                        yield Member(f"{name}/{link}", info.size, content)
    for target, paths in wanted.items():
        for path in paths:
            yield Member(f"{name}/{path}", problem=_broken(target))


def _end(links: Mapping[str, str | None], path: str) -> str | None:
    """The path to which ``path`` leads over at most ``_MAX_LINKS`` links."""
    seen: set[str] = set()
    end: str | None = path
    while end is not None and end in links and end not in seen and len(seen) < _MAX_LINKS:
        seen.add(end)
        end = links[end]
    return end


def _entries(location: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str]]:
    """The members of a tar that are not folders, each with its path."""
    with (
        remote.open_file(location) as file,
        tarfile.open(fileobj=file, mode="r:*", tarinfo=StrictInfo, encoding="utf-8", errors="surrogateescape") as tar,
    ):
        while (info := tar.next()) is not None:
            # A TarFile keeps all members it has read, 1 GiB for a million.
            tar.members = []  # type: ignore[attr-defined]
            if not info.isdir() and not info.name.endswith("\\"):
                yield tar, info, member_name(info.name)


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> Member:
    if info.isreg():
        return Member(name, info.size, functools.partial(_extract, tar, info))
    return Member(name, problem="not a file")


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(info)
    assert content is not None, info
    return content.read()


def is_plain_tar(location: str) -> bool:
    """Whether the file at the path ``location`` is a tar that is not compressed."""
    with Path(location).open("rb") as file:
        return is_tar(file, "r:")
