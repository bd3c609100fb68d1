"""Memory that a step frees is kept for the next: fetching pages anew took up to half of a CPU's backward pass."""

import ctypes
import os

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of glibc's mallopt(3)
PAD = 64 << 20  # bytes by which the heap grows at once


def keep_freed_memory() -> None:
    """Have the process ask for huge pages and reuse what it frees; its memory stays at its peak meanwhile.

    Takes effect before torch's first allocation, and without glibc not at all. Values that the environment gives
    (THP_MEM_ALLOC_ENABLE, MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_) are left as they are.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD)):
            mallopt(option, value)
