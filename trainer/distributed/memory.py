"""Settings of the C library's memory allocator, for training on CPUs."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Configure glibc malloc to keep freed memory, for training on CPUs: by default it returns large blocks, such as
    activations, to the system, which costs page faults in every step. Has no effect without glibc."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_TOP_PAD, 64 << 20)  # the size of a thread's heap, so that heaps are kept whole
