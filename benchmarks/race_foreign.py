"""Foreign training scripts in race.py: started with the same pictures and seconds, judged by what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race_training import GRID, Judge, Pictures, describe, save_sheet
from torch import Tensor

from catgan.command import UserError, say
from infer.latents import latents
from infer.session import Generator
from trainer.data.images import ImageError, decode

PLACEHOLDERS = ("data", "out", "seconds", "seed", "size", "num")
GRACE = 10.0  # seconds from SIGTERM to SIGKILL
_TAIL = 300  # characters of a failed command's output in the message about it


@dataclass(frozen=True)
class Foreign:
    """A foreign training script: its name in the results and its command, split into words."""

    name: str
    command: tuple[str, ...]


def parse_foreign(text: str) -> Foreign:
    """``NAME=COMMAND``.

    Raises:
        UserError: not of that form, or there is no such program.
    """
    name, equals, command = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"--foreign {text!r}: give NAME=COMMAND, the name of letters, digits, '.', '_' and '-', such as"
            " 'theirs=python theirs.py {data} {out} {seconds}'"
        )
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--foreign {name}: the command cannot be split into words ({error})") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--foreign {name}: no program {words[0] if words else ''!r} to start")
    return Foreign(name, words)


def run_foreign(
    foreign: Foreign, values: Mapping[str, Any], label: str, minutes: float, judge: Judge, sheet: Path
) -> dict[str, Any]:
    """Let the script train for ``minutes``, judge what it leaves.

    Args:
        values: of the ``PLACEHOLDERS``; ``out`` is emptied beforehand, the script's output goes to ``out`` + ".log".
        sheet: the file for the sample grid.

    Returns:
        As ``race_training.train``, with one point in the curve.

    Raises:
        UserError: it failed, or left too little.
    """
    out, size, num = Path(values["out"]), int(values["size"]), int(values["num"])
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    words = [_fill(word, values) for word in foreign.command]
    log = out.with_name(f"{out.name}.log")
    seconds = _run(words, log, limit=1.2 * minutes * 60 + 60, label=label)
    pictures = _open(out, size, num, label, log)
    images = _images(out)
    point = {
        "minutes": round(seconds / 60, 3),
        "kimg": None if images is None else round(images / 1000, 3),
        **judge.measure(pictures),
        "distance_live": None,
    }
    rate = None if images is None else round(images / seconds, 1)
    save_sheet(pictures, sheet, min(GRID, num))
    say(describe(label, point, minutes, rate))
    return {"curve": [point], "images_per_second": rate, "kimg": point["kimg"], "seconds": round(seconds, 2)}


def _fill(word: str, values: Mapping[str, Any]) -> str:
    """The word with its placeholders replaced; other braces stay, so that a word may hold code."""
    return re.sub("{(" + "|".join(PLACEHOLDERS) + ")}", lambda found: str(values[found[1]]), word)


def _run(words: Sequence[str], log: Path, limit: float, label: str) -> float:
    """Run the command in a process group of its own; returns its seconds.

    After ``limit`` seconds it is asked to end (SIGTERM), ``GRACE`` seconds later it is ended. Whatever it started is
    ended with it: the next training needs the machine for itself.
    """
    began = time.perf_counter()
    overdue = False
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{label}: cannot start {words[0]} ({error.strerror})") from None
        try:
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                overdue = True
                _signal_group(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            seconds = time.perf_counter() - began
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        what = f"was ended after {limit:.0f} s" if overdue else f"failed with status {process.returncode}"
        raise UserError(f"{label}: the command {what}; {_end_of(log)}")
    return seconds


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it; a zombie on macOS
        os.killpg(group, number)


def _end_of(log: Path) -> str:
    """The last lines of the output as one, and where the rest is."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    text = " | ".join(" ".join(line.split()) for line in lines if line.strip())
    return f"its output in {log} ends: {'...' if len(text) > _TAIL else ''}{text[-_TAIL:]}" if text else "no output"


def _open(out: Path, size: int, num: int, label: str, log: Path) -> Pictures:
    """What the script left, as a function from seeds to pictures; PNG files are taken in the order of their names."""
    if (out / "gen.onnx").is_file():
        generator = Generator(out / "gen.onnx", "auto")
        if generator.size != size:
            raise UserError(f"{label}: gen.onnx makes {generator.size}x{generator.size}, the race is {size}x{size}")
        return lambda seeds: torch.from_numpy(generator(latents(seeds, generator.z_dim))).permute(0, 3, 1, 2)
    files = sorted(out.glob("*.png"))
    if len(files) < num:
        raise UserError(
            f"{label}: left no gen.onnx and {len(files):,} PNG files in {out}, needed are {num:,}; {_end_of(log)}"
        )

    def read(file: Path) -> np.ndarray:
        try:
            pixels = np.asarray(decode(file.read_bytes()))
        except ImageError as error:
            raise UserError(f"{label}: {file} cannot be read as a picture ({error})") from None
        if pixels.shape != (size, size, 3):
            raise UserError(f"{label}: {file} is {pixels.shape[1]}x{pixels.shape[0]}, the race is {size}x{size}")
        return pixels

    def pictures(seeds: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([read(files[seed]) for seed in seeds])).permute(0, 3, 1, 2)

    return pictures


def _images(out: Path) -> int | None:
    """The images trained on, if the script says so in progress.json."""
    path = out / "progress.json"
    if not path.is_file():
        return None
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, LookupError, TypeError):
        images = None
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        say(f'warning: {path} is not {{"images": N}}, so there are no images per second')
        return None
    return images
