"""The processors and the temporary folder of this machine."""

from __future__ import annotations

import os
import tempfile

from catgan.command import say

SPIN_COUNT = 30_000
"""How often a waiting thread of OpenMP looks before it sleeps, see docs/scaling.md; the default is 300,000."""

_SOCKET_BYTES = 103  # the longest path of a Unix socket on macOS; 107 on Linux


def cores() -> int:
    """The number of cores this process may use, in many containers fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spin_less() -> None:
    """Let PyTorch's threads, from its import on and in children too, wait for each other in a loop for a tenth as long
    as by default before they sleep: a thread that waits in a loop can occupy the core that the other one needs. Does
    nothing if the user has chosen."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def shorten_tmpdir(socket: str = "/pymp-12345678/listener-12345678") -> None:
    """Let this process and its children use another folder for temporary files if the path of ``socket`` in TMPDIR
    would be too long, or TMPDIR cannot be written: clusters give jobs a folder of their own, deep in a file system.

    Args:
        socket: the longest path of a Unix socket below TMPDIR; by default that of Python's multiprocessing.
    """
    given = tempfile.gettempdir()  # TMPDIR if it can be written
    for folder in dict.fromkeys((given, "/tmp", "/var/tmp", "/dev/shm")):
        if len(os.fsencode(folder + socket)) <= _SOCKET_BYTES and os.access(folder, os.W_OK):
            if folder != given:
                say(f"the temporary folder is {folder}: {given} is too long for sockets")
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            return
