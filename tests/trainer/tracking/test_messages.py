from __future__ import annotations

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
