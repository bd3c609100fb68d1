"""Find out how much memory this process has taken, and how much is left to it."""

import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the bytes that can be taken without swapping, on the machine and in its container; 0 if unknown."""
    found = [value for value in (_of_machine(), _of_container()) if value is not None]
    return max(0, min(found, default=0))


def peak_bytes() -> float:
    """Return the largest memory of this process so far; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024.0 * peak  # bytes on macOS, KiB elsewhere


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_container() -> int | None:
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics.get("inactive_file", 0))  # pages of files are given back when asked
    except (OSError, ValueError):
        return None
