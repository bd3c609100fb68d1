"""Keep the memory that a step frees for the next: fetching pages anew took up to half of a CPU's backward pass."""

import ctypes
import mmap
import os
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of glibc's mallopt(3)
PAD = 64 << 20  # bytes by which the heap grows at once
PAGEOUT = 21  # Linux' MADV_PAGEOUT


def ask_for_huge_pages() -> None:
    """Set it before torch's first allocation; a value that the environment gives stays as it is."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Have the process reuse what it frees rather than give it back; its memory stays at its peak meanwhile.

    Without glibc it has no effect, nor where the environment has settings of its own (MALLOC_..., GLIBC_TUNABLES).
    """
    mallopt = libc_function("mallopt")
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD)):
        mallopt(option, value)


def drop_pages(address: int, size: int) -> None:
    """Ask the system to drop pages of a mapped file, to be read again when needed; elsewhere it may have no effect."""
    start, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = libc_function("madvise")
    if madvise is not None and end > start:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGEOUT)


def libc_function(name: str) -> Any:
    """Return a function of the C library; None where it lacks it, and on Windows, where ctypes cannot open it so."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
