"""Maximum mean discrepancies: KID (a cubic kernel of Inception features) and CMMD (a Gaussian one of CLIP's)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput

from .features import Array, as_features, blocks, same_width, squared_distances

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
Kernel = Callable[[Array, Array], Array]


def cubic_kernel(rows: Array, columns: Array) -> Array:
    """Return (x . y / d + 1)^3. Source: Binkowski et al. 2018, section 4."""
    product = rows @ columns.T / rows.shape[1] + 1
    return product * product * product


def gaussian_kernel(rows: Array, columns: Array) -> Array:
    """Return exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10. Source: Jayasumana et al. 2024, section 4."""
    kernel: Array = np.exp(squared_distances(rows, columns) / (-2 * CMMD_SIGMA**2))
    return kernel


def kid(generated: Any, reference: Any, subsets: int | None = None, subset_size: int = 1000, seed: int = 0) -> float:
    """Return the unbiased squared MMD of features (n, d) under the cubic kernel; it may be a little below 0.

    subsets: None takes all features once. Else the mean over so many random subsets of `subset_size` of each set.
    Source: Binkowski et al. 2018, equation 4.
    """
    left, right = as_features(generated, "generated"), as_features(reference, "reference")
    same_width(left, right)
    if subsets is None:
        return float(unbiased_mmd(*kernel_sums(left, right, cubic_kernel), len(left), len(right)))
    values = kid_of_subsets(left, right, subsets, subset_size, seed)
    return float(values.mean())


def kid_of_subsets(left: Array, right: Array, subsets: int, subset_size: int, seed: int) -> Array:
    """Return the KID of each random subset, drawn without replacement. Raises BadInput where there are too few."""
    if subsets < 1 or not 2 <= subset_size <= min(len(left), len(right)):
        raise BadInput(
            f"kid: {subsets} subsets of {subset_size} from {len(left)} and {len(right)} images; take subsets of 2 to "
            f"{min(len(left), len(right))}, or subsets=None for all images"
        )
    random = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        one, other = (each[random.permutation(len(each))[:subset_size]] for each in (left, right))
        values.append(unbiased_mmd(*kernel_sums(one, other, cubic_kernel), subset_size, subset_size))
    return np.array(values)


def kernel_sums(left: Array, right: Array, kernel: Kernel) -> tuple[float, float, float, float, float]:
    """Return the sums of the kernel within left, within right, between them, and those of the two diagonals."""
    within = [sum(float(kernel(each[rows], each).sum()) for rows in blocks(len(each))) for each in (left, right)]
    between = sum(float(kernel(left[rows], right).sum()) for rows in blocks(len(left)))
    diagonals = [sum(float(kernel(row[None], row[None])[0, 0]) for row in each) for each in (left, right)]
    return within[0], within[1], between, diagonals[0], diagonals[1]


def unbiased_mmd(left: Any, right: Any, between: Any, left_diagonal: Any, right_diagonal: Any, n: int, m: int) -> Any:
    """Return the U-statistic from the sums of `kernel_sums`: no image is compared with itself."""
    return (left - left_diagonal) / (n * (n - 1)) + (right - right_diagonal) / (m * (m - 1)) - 2 * between / (n * m)


def cmmd(generated: Any, reference: Any) -> float:
    """Return 1000 times the squared MMD of CLIP embeddings (n, d) under a Gaussian kernel of sigma 10.

    Embeddings are scaled to length 1 here. The estimate is the biased one of the authors' code: each image also meets
    itself, so equal sets give 0 and nothing is negative. Source: Jayasumana et al. 2024, equations 4 and 5.
    """
    left, right = unit_rows(as_features(generated, "generated")), unit_rows(as_features(reference, "reference"))
    same_width(left, right)
    within_left, within_right, between, _, _ = kernel_sums(left, right, gaussian_kernel)
    n, m = len(left), len(right)
    return max(CMMD_SCALE * (within_left / n**2 + within_right / m**2 - 2 * between / (n * m)), 0.0)


def unit_rows(features: Array) -> Array:
    """Return rows scaled to length 1. Raises BadInput for a row of zeros."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise BadInput(f"row {int(np.argmin(lengths))} of the embeddings is zero: it has no direction")
    scaled: Array = features / lengths
    return scaled


class KernelResampler:
    """The MMD of resampled images: the kernel is computed once for all resamples.

    left_weights (n, resamples), right_weights (m, resamples): how often each image counts. Images that count twice are
    not compared with themselves where `unbiased`.
    """

    def __init__(self, left: Array, right: Array, kernel: Kernel, *, unbiased: bool):
        self.left, self.right, self.kernel, self.unbiased = left, right, kernel, unbiased

    def __call__(self, left_weights: Array, right_weights: Array) -> Array:
        within_left = self._within(self.left, left_weights)
        within_right = self._within(self.right, right_weights)
        between = self._between(self.left, self.right, left_weights, right_weights)
        pairs = left_weights.sum(axis=0) * right_weights.sum(axis=0)
        mmd: Array = within_left + within_right - 2 * between / pairs
        return mmd

    def _within(self, rows: Array, weights: Array) -> Array:
        total, pairs = self._between(rows, rows, weights, weights), weights.sum(axis=0) ** 2
        if self.unbiased:
            diagonal = np.array([self.kernel(row[None], row[None])[0, 0] for row in rows])
            total, pairs = total - diagonal @ weights**2, pairs - (weights**2).sum(axis=0)
        mean: Array = total / pairs
        return mean

    def _between(self, rows: Array, columns: Array, row_weights: Array, column_weights: Array) -> Array:
        total = np.zeros(row_weights.shape[1])
        for block in blocks(len(rows)):
            total += (row_weights[block] * (self.kernel(rows[block], columns) @ column_weights)).sum(axis=0)
        return total
