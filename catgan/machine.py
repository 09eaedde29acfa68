"""What this machine offers."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores this process may use, which is fewer than the machine has in many containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
