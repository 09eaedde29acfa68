"""Why a file cannot be used, in one line for ``rejected.csv`` and messages."""

from __future__ import annotations

import re
import struct

from catgan.command import without_queries

_MAX_LENGTH = 100

# What a decoder that relies on intact data stumbles over; the texts are about its own code.
_INTERNAL = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, UnicodeError, struct.error)

# Python's notation of objects, such as <ZipInfo filename='a.png'>, and of bytes, with parentheses around it.
_NOTATION = re.compile(r"""\s*\([^()]*\bb(['"]).*\1\)|\s*<[A-Za-z_].*>|\s*\bb(['"]).*\2""")


def reason_of(error: BaseException) -> str:
    """What an exception says, for people: on one line, at most 100 characters, without Python's notation and without
    the query strings of URLs; "damaged" if nothing is left."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, _INTERNAL):
        return "damaged"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = _NOTATION.sub("", " ".join(without_queries(text).split())).strip(" :,")
    if not text or "()" in text:  # "invalid literal for int()"
        return "damaged"
    return text[:_MAX_LENGTH]
