"""Checkpoints of every format: opened from headers, every key accounted for, read and written one tensor at a time.

Canonical names are LDM's for the U-Net and the VAE, Hugging Face's with `text_model.` for the text encoder: those of
our networks. `base.py` says what a format provides, `formats.py` lists all formats, `open.py` sorts the keys of a file
into parts, `match.py` pairs the keys of a part with a network's names one to one, `sizes.py` and `spec.py` find out
what weights do not show, `load.py` builds networks and fills them.

To add a format, write one file and one line:

1. A file `checkpoints/NAME.py` that ends in `FORMAT = Format(name="NAME", title=..., ...)`. Of Format's fields it fills
   in those that apply: `open` reads the headers at a path of the format and returns None for any other path;
   `key_rules` say which part a key belongs to; `dialects` recognise the names inside a part and map our names to them;
   `sizes` and `facts` translate its config files; `write` writes a whole model. `ldm.py` is the shortest example.
2. The line: `NAME.FORMAT` in FORMATS of `formats.py`. Formats are asked in that order.

Loading, `inspect`, `convert --to NAME`, and training from such a checkpoint follow. A parametrised test of
tests/checkpoints/test_export.py takes every format that has a `write` there and back.
"""

from .base import Checkpoint, ModelSpec
from .diffusers import export_diffusers
from .ldm import export_ldm
from .match import match, unused_text
from .nemo import export_nemo
from .open import open_checkpoint
from .sizes import architecture
from .spec import padded_length, prediction_of, reads_as_open_clip, spec_of

__all__ = [
    "Checkpoint",
    "ModelSpec",
    "architecture",
    "export_diffusers",
    "export_ldm",
    "export_nemo",
    "match",
    "open_checkpoint",
    "padded_length",
    "prediction_of",
    "reads_as_open_clip",
    "spec_of",
    "unused_text",
]
