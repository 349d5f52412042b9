"""The C allocator of a process that trains on a CPU."""

import ctypes
import os

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_pages() -> bool:
    """Tells glibc's malloc to keep freed memory for later allocations, and returns whether the settings took effect.

    XLA's CPU client frees a step's buffers when the step ends, and glibc hands large ones back to the system, so the
    next step faults every page in again (230,000 faults a step of SmolLM2-135M, 0.4 CPU seconds, and more where a
    virtual machine's host must supply the pages). With the settings, resident memory stays at its high-water mark.
    Call it before any threads start. A process whose environment configures malloc (`MALLOC_…`, `GLIBC_TUNABLES`)
    keeps that configuration, and one with another C library or allocator is left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        return False
    # One arena only: the others are mapped in pieces, which are unmapped once free.
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
    answers = [libc.mallopt(option, value) for option, value in options.items()]
    return all(answers)
