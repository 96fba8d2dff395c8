"""How much memory a run takes, and what glibc does with what a step frees; elsewhere than on glibc, nothing happens."""

import ctypes
import os
import resource
import sys
from typing import Any

import jax

_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None


def keep_memory() -> None:
    """Keep it: else the next step waits for the kernel to find and zero the same pages.

    That is a sixth to a third of a step on a CPU (benchmarks/RESULTS.md). To be called before JAX starts its threads.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        _libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks
        _libc.mallopt(-8, 1)  # M_ARENA_MAX: and is one for all threads


def trim_memory() -> None:
    """Give back what is free now.

    To be called now and then: where small blocks stay within what a step has freed, the next one takes more beside it.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def memory_in_use() -> int:
    """The most bytes that the fullest device of this host has held or, where none tells, this process."""
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(told) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
