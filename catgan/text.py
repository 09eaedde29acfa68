"""Text from file names, which may hold control characters and bytes that are not UTF-8, for records and messages."""

from __future__ import annotations

import json
import re
from typing import Any

# Python reads a byte that is not UTF-8 as a surrogate, which no UTF-8 file and no JSON can hold.
_SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters, line separators and changes of the writing direction: they break lines or hide text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""``text`` as one line of valid Unicode: ``\r`` for a carriage return, ``\xff`` for a byte that is not UTF-8.

    Backslashes stay as they are, so ``printable(printable(text))`` is ``printable(text)``.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), encodable(text))


def encodable(text: str) -> str:
    r"""``text`` with each surrogate replaced: by ``\xff`` for the byte it stands for, else by ``\ud800``."""
    return _SURROGATES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def to_json(value: Any, **options: Any) -> str:
    """``json.dumps(value, **options)`` with every string ``encodable``."""
    return json.dumps(_encodable_strings(value), **options)


def _encodable_strings(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {_encodable_strings(key): _encodable_strings(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable_strings(one) for one in value]
    return value
