from __future__ import annotations

import threading

import pytest

from trainer.outbox import Outbox, brief, redact


def test_what_fails_is_offered_again(capsys: pytest.CaptureFixture[str]) -> None:
    outbox, done, away = Outbox("the server"), [], threading.Event()
    away.set()

    def job(number: int) -> None:
        if away.is_set():
            raise ConnectionError("gone")
        done.append(number)

    for number in range(3):
        outbox.put(lambda number=number: job(number))  # type: ignore[misc]
        assert not outbox.flush(0.1)
    assert done == []
    away.clear()
    assert outbox.flush(30)
    assert sorted(done) == [0, 1, 2]
    outbox.close(30)
    said = capsys.readouterr().err
    assert said.count("the server does not take records (gone)") == 1
    assert said.count("the server takes records again") == 1


def test_a_hopeless_job_does_not_keep_the_others_back(capsys: pytest.CaptureFixture[str]) -> None:
    outbox, done = Outbox("the server"), []

    def hopeless() -> None:
        raise ValueError("never")

    outbox.put(hopeless)
    for number in range(5):
        outbox.put(lambda number=number: done.append(number))  # type: ignore[misc]
    outbox.close(3)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert "did not take all" in capsys.readouterr().err


def test_putting_does_not_wait() -> None:
    outbox, gate, done = Outbox("the server"), threading.Event(), threading.Event()
    outbox.put(gate.wait)
    outbox.put(done.set)  # would never come back if it waited
    assert not done.is_set()
    gate.set()
    outbox.close(30)
    assert done.is_set()


def test_brief_names_the_innermost_cause_of_the_system() -> None:
    outer = RuntimeError("a long paragraph")
    outer.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert brief(outer) == "[Errno 111] Connection refused"
    outer.__cause__ = ValueError("an inner detail")
    assert brief(outer) == "a long paragraph"
    assert brief(ValueError("two\nlines of http://a:b@c/d")) == "two lines of http://c/d"
    assert len(brief(ValueError("x" * 1000))) < 250


def test_redact() -> None:
    assert redact("postgresql://user:pass@host/db and a@b") == "postgresql://host/db and a@b"
