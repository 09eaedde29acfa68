"""What a worker sets up in its process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_KEEP = """
import resource, sys, threading, torch
from trainer.launch import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        parts = [torch.ones(5 << 20) for _ in range(4)]  # 20 MiB each
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    faults()
    print(faults())

if "keep" in sys.argv:
    keep_freed_memory()
measure()
thread = threading.Thread(target=measure)  # as in Ray Train's workers
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set here belongs to glibc")
def test_kept_memory_costs_no_page_faults():
    default, kept = (
        subprocess.run([sys.executable, "-c", _KEEP, way], check=True, capture_output=True, text=True).stdout.split()
        for way in ("default", "keep")
    )
    assert max(map(int, kept)) < int(default[0]) / 10
