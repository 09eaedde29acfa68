"""Commands in messages and help texts exist, with the options that they are printed with."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import pytest
from mlflow.cli import cli as mlflow
from ray.scripts.scripts import cli as ray

from export.cli import main as catexport
from infer.cli import main as catinfer
from trainer.cli import main as cattrain
from trainer.data.cli import main as catdata
from trainer.launch.driver import main as train
from trainer.metrics.catfid.cli import main as catfid

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("catgan", "infer", "trainer", "export", "cluster")
OURS: dict[str, Callable[[list[str]], Any]] = {
    "catdata": catdata,
    "catexport": catexport,
    "catfid": catfid,
    "catinfer": catinfer,
    "cattrain": cattrain,
    "python trainer/run.py": train,
}


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, without docstrings; ``X`` stands for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | statements:
            yield node.value


def printed() -> list[str]:
    found = {
        command
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for text in texts(path)
        for command in re.findall(r"`([^`\n]+)`", text)
    }
    return sorted(
        command for command in found if command.startswith((*(f"{name} " for name in OURS), "mlflow ", "ray "))
    )


def help_of_ours(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        OURS[name]([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def help_of_click(group: click.Command, words: list[str]) -> str:
    while isinstance(group, click.Group) and words:
        group = group.commands[words.pop(0)]
    return "\n".join(option for parameter in group.params for option in parameter.opts)


def test_there_are_commands_of_each_kind() -> None:
    assert {command.split()[0] for command in printed()} >= {"catdata", "catexport", "cattrain", "mlflow", "ray"}


@pytest.mark.parametrize("command", printed())
def test_a_printed_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = next((name for name in OURS if command.startswith(f"{name} ")), command.split()[0])
    words = shlex.split(command.removeprefix(name))
    subcommands = list(takewhile(re.compile("[a-z][a-z-]*").fullmatch, words))
    if name == "mlflow":
        text = help_of_click(mlflow, subcommands)
    elif name == "ray":
        text = help_of_click(ray, subcommands)
    else:
        text = help_of_ours(name, subcommands if name in ("catdata", "cattrain") else [], capsys)
    for option in {word.partition("=")[0] for word in words if word.startswith("-")} - {"--help"}:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{name} has no option {option}"
