"""Addresses and errors in messages and files: on one line, without passwords."""

from __future__ import annotations

import re

_LENGTH = 200
_USER = re.compile(
    r"://(?:[^/?#\s]*@"
    # SQLAlchemy takes all up to the first @ for the password of a database, / ? and # too.
    r"|(?<!http://)(?<!https://)[^:/\s\[]*:[^@\s]*@"
    # Such a password makes a web address invalid, which is when it is printed. What could be a port is none.
    r"|[^/?#\s:@\[]*:(?!\d*(?:[/?#\s]|$))[^@\s]*@)"
)


def redact(text: str) -> str:
    """``text`` without the users and passwords of URLs in it."""
    return _USER.sub("://", text)


def brief(error: BaseException) -> str:
    """An error as one line of about 200 characters at most, without passwords.

    HTTP clients wrap "Connection refused" in a paragraph, so if the innermost cause is an OSError its text is taken.
    """
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    text = str(cause) if isinstance(cause, OSError) else str(error)
    text = redact(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _LENGTH else text[:_LENGTH] + "..."
