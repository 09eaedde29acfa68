"""The processors of this machine."""

from __future__ import annotations

import os


def cores() -> int:
    """The number of cores this process may use, in many containers fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
