"""Freed memory is kept by the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_MEASURE = """
import resource, sys, threading, torch
from trainer.distributed.memory import keep_freed_memory

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


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets parameters of glibc's malloc")
def test_kept_memory_avoids_page_faults():
    # glibc adapts these thresholds to the process. Setting them in the environment fixes them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

    def faults(mode: str) -> list[int]:
        command = [sys.executable, "-c", _MEASURE, mode]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        return [int(line) for line in output.split()]

    assert max(faults("keep")) < min(faults("default")) / 10
