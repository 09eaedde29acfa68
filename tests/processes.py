"""Processes of a training, found among others."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def command_line(process: psutil.Process) -> str:
    """The arguments, separated by spaces; empty for a process that has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def training_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Ray Train's workers among ``processes``, in their order."""
    return [process for process in processes if "ray::RayTrainWorker" in command_line(process)]
