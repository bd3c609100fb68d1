"""The folder for files that can be made again."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return `latentsmith/NAME` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentsmith" / name
