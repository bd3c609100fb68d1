"""Names of precisions, and the dtypes that they mean."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from latentsmith.files.errors import BadInput

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """The dtypes that --dtype takes."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of --dtype
PRECISIONS = {  # of trainer.precision: (dtype of the weights, dtype that autocast computes in, or None)
    "32-true": ("float32", None),
    "bf16-mixed": ("float32", "bfloat16"),
    "16-mixed": ("float32", "float16"),
    "bf16-true": ("bfloat16", None),
    "16-true": ("float16", None),
}


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name given as --dtype. Raises BadInput for another name."""
    import torch

    if name not in DTYPES:
        raise BadInput(f"dtype {name} is not one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def weights_dtype(precision: str) -> torch.dtype:
    """Return the dtype of trained weights under a trainer.precision."""
    import torch

    dtype: torch.dtype = getattr(torch, PRECISIONS[precision][0])
    return dtype


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in under a trainer.precision, or None where there is no autocast."""
    import torch

    name = PRECISIONS[precision][1]
    return getattr(torch, name) if name else None


def half_precision(precision: str) -> torch.dtype | None:
    """Return the dtype below float32 that a trainer.precision computes in, or None where it is float32."""
    import torch

    dtype = autocast_dtype(precision) or weights_dtype(precision)
    return None if dtype == torch.float32 else dtype
