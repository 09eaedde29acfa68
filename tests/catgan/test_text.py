"""Text for records and messages: one line, valid Unicode."""

from __future__ import annotations

import json

import pytest

from catgan.command import run_command, say
from catgan.text import printable, to_json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("katze ü 猫 🐈 a\\b", "katze ü 猫 🐈 a\\b"),
        ("Icon\r", r"Icon\r"),
        ("a\nb\tc\0", r"a\nb\tc\x00"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("line\u2028end \u202egnp.exe", r"line\u2028end \u202egnp.exe"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_printable_text_is_one_line_and_utf_8(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    assert len(printable(text).encode().splitlines()) == 1


def test_json_has_no_surrogates() -> None:
    text = to_json({"caf\udce9": ["\udcff", ("🐈", 1)], "n": None})
    assert json.loads(text) == {"caf\\xe9": ["\\xff", ["🐈", 1]], "n": None}
    json.loads(text).__repr__().encode()


def test_messages_and_results_of_commands_are_single_lines_of_utf_8(capfd: pytest.CaptureFixture[str]) -> None:
    say("no image in a\rb\x1b[2J\udcff")
    run_command("test", lambda argv: {"out": "a\udcff"}, [])
    captured = capfd.readouterr()
    assert captured.err == "no image in a\\rb\\x1b[2J\\xff\n"
    assert json.loads(captured.out) == {"out": "a\\xff"}
