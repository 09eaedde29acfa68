from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from trainer.tracking.messages import brief, redact


def test_brief_names_an_innermost_cause_of_the_operating_system() -> None:
    outer = RuntimeError("a long paragraph")
    outer.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert brief(outer) == "[Errno 111] Connection refused"
    outer.__cause__ = ValueError("an inner detail")
    assert brief(outer) == "a long paragraph"
    assert brief(ValueError("two\nlines of http://a:b@c/d")) == "two lines of http://c/d"
    assert len(brief(ValueError("x" * 1000))) < 250


def test_redact() -> None:
    assert redact("postgresql://user:pass@host/db and a@b") == "postgresql://host/db and a@b"
    assert redact("http://me:p@ss@host") == "http://host"
    assert redact("http://host/a?to=b@c") == "http://host/a?to=b@c"
    assert redact("postgresql://me:p@host/db?to=b@c") == "postgresql://host/db?to=b@c"


@pytest.mark.parametrize("password", ["a/b", "/b", "1/b", "a?b#c", "12", "1#"])
def test_a_password_is_redacted_as_far_as_sqlalchemy_takes_it(password: str) -> None:
    uri = f"postgresql://me:{password}@host:5432/db"
    assert make_url(uri).password == password
    assert redact(f"cannot use {uri} (a@b)") == "cannot use postgresql://host:5432/db (a@b)"


@pytest.mark.parametrize("password", ["a/b", "a?b", "1a#b"])
def test_a_password_that_makes_a_web_address_invalid_is_redacted(password: str) -> None:
    assert redact(f"http://me:{password}@host:5000/x") == "http://host:5000/x"


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000/a@b",
        "http://[::1]:5000/a@b",
        "https://host:5000?to=a@b",
        "s3://bucket/a:b@c",
        "sqlite:////runs/a:b@c.db",
        "http://host:5000 and a@b",
    ],
)
def test_what_is_no_password_stays(uri: str) -> None:
    assert redact(uri) == uri
