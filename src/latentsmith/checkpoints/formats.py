"""The table of all formats, and what follows from it: which part a key belongs to, which dialect a part is in."""

import re
from collections.abc import Mapping
from typing import Any

from . import clip, diffusers, ldm, nemo, run
from .base import Dialect, Format, Part

# In the order in which they are asked; `ldm` takes every single file and every U-Net and VAE that the others leave.
FORMATS: dict[str, Format] = {
    format.name: format for format in (nemo.FORMAT, run.FORMAT, diffusers.FORMAT, clip.FORMAT, ldm.FORMAT)
}
WRAPPERS = {
    "_orig_mod",
    "module",
}  # put into keys by torch.compile, and by Megatron's wrappers
KEY_RULES = [(cls, re.compile(pattern)) for format in FORMATS.values() for cls, pattern in format.key_rules]


def classify_key(key: str) -> tuple[str, str]:
    """Return the class of a key and the key without prefixes and wrappers.

    Classes: "unet", "vae", "text_encoder", "ema", "schedule", "other", "unknown".
    """
    if "_extra_state" in key:  # Transformer Engine's fp8 scales
        return "other", key
    path = ".".join(step for step in key.split(".") if step not in WRAPPERS)
    for cls, pattern in KEY_RULES:
        if match := pattern.match(path):
            return cls, path[match.end() :]
    return "unknown", path


def dialect_of(part: Part, config: Mapping[str, Any]) -> Dialect:
    """Recognise the dialect of a part's keys. config: that of its checkpoint."""
    found = (
        format.dialects[part.name](part.entries, config) for format in FORMATS.values() if part.name in format.dialects
    )
    return next(dialect for dialect in found if dialect)
