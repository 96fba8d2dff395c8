"""How much memory a run takes, and what glibc does with what a step frees; elsewhere than on glibc, nothing happens."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path
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


def memory_of(program: Any) -> int:
    """The bytes that a device holds at most while a compiled program runs, by XLA's own account."""
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    return held - found.alias_size_in_bytes


def memory_limit() -> int:
    """The bytes of one device or, where it does not tell, its part of what this process may have; 0: unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    told = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if told else 0
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        machine = min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return stats.get("bytes_limit") or machine // jax.local_device_count()
