"""CPU seconds of processes, from Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def of_tree(root: int) -> float:
    """CPU seconds that the process ``root`` and all below it that are alive have taken, and their finished children."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            text = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        fields = text.rpartition(")")[2].split()  # after the command's name: state, parent, ...
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    return sum(t for pid, t in ticks.items() if _is_below(pid, root, parents)) / _TICK


def of_machine() -> float:
    """CPU seconds that all processes together have taken since the machine started."""
    user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:2])) / _TICK


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root
