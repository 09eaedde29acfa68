"""Names of files and classes in one form, whichever system wrote them."""

from __future__ import annotations

import functools
import re
import unicodedata

ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".rar", ".7z"}
"""Suffixes of archives and compressed files."""

_ANNOTATIONS = {".json", ".txt", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".cls"}
_DRIVE = re.compile(r"(//[?.]/)?[A-Za-z]:(?=/)")
_JOINERS = "\u200c\u200d"  # they decide how letters and emoji look; other format characters are invisible


def member_name(name: str) -> str:
    r"""The path of an archive's member below the archive's root.

    ``\`` is a separator as ``/`` is, since programs on Windows write it. A drive letter, a leading ``/`` and ``.`` are
    dropped; ``..`` removes the folder before it, but nothing above the root.
    """
    name = name.replace("\\", "/")
    drive = _DRIVE.match(name)
    parts: list[str] = []
    for part in name[drive.end() if drive else 0 :].split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def link_target(link: str, target: str) -> str | None:
    """The path of what a symbolic link in an archive points to, as a ``member_name``; None if it is outside.

    Args:
        link: the ``member_name`` of the link.
        target: the content of the link.
    """
    target = target.replace("\\", "/")
    if target.startswith("/") or _DRIVE.match(target):
        return None
    parts = link.split("/")[:-1]
    for part in target.split("/"):
        if part == ".." and not parts:
            return None
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def suffix(name: str) -> str:
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return dot + end.lower() if stem else ""


def is_listed(path: str) -> bool:
    """Whether the ``member_name`` ``path`` may be an image, by its name: not hidden, of macOS, or an annotation."""
    if any(part == "__MACOSX" or part.startswith(".") for part in path.split("/")):
        return False
    return suffix(path) not in _ANNOTATIONS


def comparable(path: str) -> str:
    """Equal for paths that differ only in what systems write differently: separators, see ``member_name``, composed and
    decomposed letters, blanks at the ends of names, and the encoding of a name that is not UTF-8."""
    return "/".join(part.strip() for part in member_name(composed(path)).split("/"))


@functools.lru_cache(maxsize=1 << 16)
def class_name(text: str) -> str:
    """The name of a class as it is recorded: composed letters, single blanks, none at the ends, nothing invisible."""
    words = " ".join(composed(text).split())
    return "".join(c for c in words if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf")).strip()


def resemblance(label: str) -> str:
    """Equal for names of classes that differ only in case, blanks, ``_`` and ``-``, and are probably one class."""
    return re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", label).casefold())


def decode_text(data: bytes) -> str:
    """Text that is not UTF-8 as Windows-1252, which Excel writes, and of which Latin-1 is a part."""
    return "".join(_WINDOWS_1252[byte] for byte in data)


_WINDOWS_1252 = [bytes([i]).decode("cp1252", "ignore") or chr(i) for i in range(256)]


def composed(name: str) -> str:
    """``name`` with composed letters, as no macOS writes them, and with bytes that are not UTF-8 decoded."""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = decode_text(name.encode("utf-8", "surrogateescape"))
    return unicodedata.normalize("NFC", name)
