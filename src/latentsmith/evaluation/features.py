"""Check arrays of features before a metric computes with them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from latentsmith.files.errors import BadInput

Array = npt.NDArray[np.float64]
BLOCK = 1024  # rows of a product: 1024 x 100,000 float64 are 800 MB


def as_features(features: Any, name: str = "features", least: int = 2) -> Array:
    """Return features (n, d) as float64. features: an array or a tensor. Raises BadInput for what is none."""
    detached = features.detach().cpu() if hasattr(features, "detach") else features
    if str(getattr(detached, "dtype", "")) == "torch.bfloat16":
        detached = detached.float()
    array = np.asarray(detached)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise BadInput(f"{name}: an array of numbers (n, d) was expected, this is {array.dtype} {array.shape}")
    if len(array) < least:
        raise BadInput(f"{name}: {len(array)} images, at least {least} are needed")
    array = array.astype(np.float64)
    if bad := int((~np.isfinite(array)).any(axis=1).sum()):
        raise BadInput(f"{name}: {bad} of {len(array)} rows are not finite; find the images that they come from")
    return array


def same_width(left: Array, right: Array) -> None:
    """Raise BadInput for features of two kinds."""
    if left.shape[1] != right.shape[1]:
        raise BadInput(f"features of {left.shape[1]} and {right.shape[1]} numbers do not compare: use one extractor")


def blocks(count: int) -> Iterator[slice]:
    """Yield slices of at most BLOCK rows."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def squared_distances(rows: Array, columns: Array) -> Array:
    """Return squared Euclidean distances (n, m), never negative. Errors are below `rounding`."""
    norms = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    return np.maximum(norms - 2 * rows @ columns.T, 0)


def rounding(rows: Array, columns: Array) -> float:
    """Return a bound of the rounding errors of `squared_distances`."""
    largest = max(float((each**2).sum(axis=1).max()) for each in (rows, columns))
    return 8 * np.finfo(np.float64).eps * rows.shape[1] ** 0.5 * largest
