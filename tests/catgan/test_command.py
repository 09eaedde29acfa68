"""Commands whose output nobody reads, or that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from catgan.command import run_command, say


def main(argv):
    say("one")
    say("two")
    return {"n": 1}


run_command("program", main)
"""


def run(stdout: int, stderr: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=stderr, text=True, check=False)


def without_reader() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_result_that_nobody_reads_is_no_traceback() -> None:
    done = run(without_reader(), subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "one\ntwo\n")


def test_work_goes_on_when_nobody_reads_the_messages() -> None:
    done = run(subprocess.PIPE, without_reader())
    assert (done.returncode, done.stdout) == (0, '{"n": 1}\n')


def test_a_result_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(full.fileno(), subprocess.PIPE)
    problem = "program: done, but the result cannot be written (No space left on device)"
    assert (done.returncode, done.stderr) == (2, f"one\ntwo\n{problem}\n")


def test_work_goes_on_when_the_messages_cannot_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(subprocess.PIPE, full.fileno())
    assert (done.returncode, done.stdout) == (0, '{"n": 1}\n')


def test_without_stderr_stdout_has_the_result_alone() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, '{"n": 1}\n')


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    program = PROGRAM.replace('say("one")', f"open({str(tmp_path)!r})")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"program: {tmp_path}: Is a directory\n")
    done = subprocess.run([*command, "--debug"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_a_deleted_working_directory_is_one_line(tmp_path: Path) -> None:
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", sys.executable, "-c", PROGRAM]
    (tmp_path / "gone").mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path / "gone", env=environ, capture_output=True, text=True, check=False)
    problem = "program: the working directory was deleted: cd to one that exists"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{problem}\n")
