"""Freed memory stays with the process: a training step's large tensors find their pages already there.

glibc gives every block over 32 MB (smaller ones at first) back to the system when it is freed, and the
next step pays for each of its pages again: a fault, and zeros. On a CPU that is up to a third of a
training step (docs/RESULTS.md). What it costs: the process keeps its peak until it ends.
"""

from __future__ import annotations

import ctypes
import platform

MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}  # malloc.h


def keep_freed_memory() -> bool:
    """Whether it could be asked for: only where the C library is glibc. Call it before the work begins."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(key, value) == 1 for key, value in MALLOPT.values())
