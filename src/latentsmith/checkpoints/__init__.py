"""Checkpoints of every format: one key table per format, read forwards to import and backwards to export.

This room knows names and shapes, no classes. Canonical names are LDM's for the U-Net and the VAE, Hugging Face's with
`text_model.` for the text encoder.
"""

from pathlib import Path

from torch import Tensor

from latentsmith.files.pickles import forget_maps

from .diffusers import export_diffusers
from .ldm import export_ldm
from .match import Shapes, match, unused_text
from .nemo import export_nemo
from .open import Checkpoint, open_checkpoint
from .spec import ModelSpec, architecture, prediction_of, reads_as_open_clip, spec_of
from .summary import Description, PartDescription, describe

__all__ = [
    "Checkpoint",
    "Description",
    "ModelSpec",
    "PartDescription",
    "architecture",
    "check_component",
    "describe",
    "export_diffusers",
    "export_ldm",
    "export_nemo",
    "load_component",
    "match",
    "open_checkpoint",
    "prediction_of",
    "reads_as_open_clip",
    "spec_of",
    "unused_text",
]


def load_component(
    path: str | Path, part: str, shapes: Shapes, *, from_nemo: bool | None = None, weights: str = "ema"
) -> dict[str, Tensor]:
    """Read one part of any supported checkpoint, strictly.

    part: "unet", "vae" or "text_encoder". shapes: the module's own names and shapes. from_nemo: NeMo's
    `from_NeMo` key; None recognises the dialect from the content. weights: "ema" or "raw".
    Returns a tensor of exactly these shapes for each name, in the file's dtype, mapped from disk (copy-on-write).
    Raises BadInput, one line, for unreadable files and unless every model key is filled once and every file key used.
    """
    found = match(open_checkpoint(path, weights), part, shapes, from_nemo)
    tensors = {name: tensor.read() for name, tensor in found.items()}
    forget_maps()  # the tensors alone keep their file mapped: copied into a module, they take no memory besides
    return tensors


def check_component(
    path: str | Path, part: str, shapes: Shapes, *, from_nemo: bool | None = None, weights: str = "ema"
) -> None:
    """`load_component`'s checks from the file's header alone: names, shapes, accounting; no weights are read."""
    match(open_checkpoint(path, weights), part, shapes, from_nemo)
