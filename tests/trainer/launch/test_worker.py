"""What a worker sets up in its process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_KEEP = """
import resource, sys, threading, torch
from trainer.launch.worker import keep_freed_memory

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
    # The C library adapts these to what a process does; said beforehand, they stay.
    eager = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

    def faults(way: str) -> list[int]:
        command = [sys.executable, "-c", _KEEP, way]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=eager).stdout
        return [int(line) for line in output.split()]

    assert max(faults("keep")) < min(faults("default")) / 10
