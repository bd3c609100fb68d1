"""Memory that a step frees is kept for the next: fetching pages anew took up to half of a CPU's backward pass."""

import ctypes
import os

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of glibc's mallopt(3)
PAD = 64 << 20  # bytes by which the heap grows at once


def ask_for_huge_pages() -> None:
    """Before torch's first allocation; a value that the environment gives stays as it is."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Have the process reuse what it frees rather than give it back; its memory stays at its peak meanwhile.

    Without glibc it has no effect, nor where the environment says otherwise (MALLOC_..., GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD)):
            mallopt(option, value)
