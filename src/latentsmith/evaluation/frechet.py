"""The Frechet distance of two Gaussians: FID, FD-DINOv2 and the extrapolation FID-infinity.

Source: Heusel et al. 2017, equation 6; Dowson & Landau 1982.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentsmith.files.errors import BadInput

from .features import Array, as_features, same_width

EPSILON = float(np.finfo(np.float64).eps)
SIZES = 15  # of subsets for FID-infinity, as Chong & Forsyth 2020 take
SMALLEST_SHARE = 0.25  # of the images in the smallest subset


@dataclass(frozen=True, eq=False)
class Moments:
    """Count of features, their mean (d,), and the sum of outer products about it (d, d): float64."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:
        """Merge the moments of two sets of features. Source: Chan et al. 1979."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Array:
        """Return the unbiased covariance (d, d): divided by count - 1, as every FID does."""
        return self.scatter / (self.count - 1)


def moments_of(chunks: Iterable[Any]) -> Moments:
    """Return the moments of features that come in chunks (n, d), none of which is kept. One image may be a chunk."""
    total: Moments | None = None
    for chunk in chunks:
        part = Moments.of(as_features(chunk, least=1))
        total = part if total is None else total + part
    if total is None or total.count < 2:
        raise BadInput(f"{total.count if total else 0} images, at least 2 are needed for a covariance")
    return total


def fid(generated: Any, reference: Any) -> float:
    """Return the Frechet distance of features (n, d), also where n < d. Equal sets give 0."""
    return frechet_distance(Moments.of(as_features(generated)), Moments.of(as_features(reference)))


def frechet_distance(left: Moments, right: Moments) -> float:
    """Return |mean difference|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)).

    With C = L L^T the last trace is the sum of the singular values of L1^T L2: no root of a product that is not
    symmetric, and no complex part. What is below the rounding of its terms is 0.
    """
    same_width(left.mean[None], right.mean[None])
    return _distance(left, right, left_factor(left.covariance), left_factor(right.covariance))


def _distance(left: Moments, right: Moments, left_root: Array, right_root: Array) -> float:
    traces = float(np.trace(left.covariance) + np.trace(right.covariance))
    root = float(np.linalg.svd(left_root.T @ right_root, compute_uv=False).sum())
    apart = float(((left.mean - right.mean) ** 2).sum())
    distance = apart + traces - 2 * root
    means = float((left.mean**2).sum() + (right.mean**2).sum())
    return distance if distance > EPSILON * len(left.mean) * (traces + means) else 0.0


def left_factor(covariance: Array) -> Array:
    """Return L (d, rank) with L L^T = covariance, from the eigenvalues of the symmetric matrix."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(float(values[-1]), 0.0) * len(values) * EPSILON
    factor: Array = vectors[:, kept] * np.sqrt(values[kept])
    return factor


class FrechetToReference:
    """The Frechet distance of weighted features to one reference, cheap to repeat for resamples and subsets.

    Each costs one product and the eigenvalues of L^T C L, where L L^T is the reference's covariance.
    """

    def __init__(self, features: Array, reference: Moments):
        same_width(features, reference.mean[None])
        self.origin, self.trace = reference.mean, float(np.trace(reference.covariance))
        self.centred = features - reference.mean
        self.norms = (self.centred**2).sum(axis=1)
        self.projected = self.centred @ left_factor(reference.covariance)

    def __call__(self, weights: Array) -> float:
        """Return the distance with image i counted weights[i] times, at least 2 in all."""
        used = weights > 0
        weights, projected = weights[used], self.projected[used]
        count = float(weights.sum())
        apart = weights @ self.centred[used] / count
        squared = float(apart @ apart)
        trace = (float(weights @ self.norms[used]) - count * squared) / (count - 1)
        rows = (projected - weights @ projected / count) * np.sqrt(weights / (count - 1))[:, None]
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        root = float(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum())
        return max(squared + trace + self.trace - 2 * root, 0.0)


def fid_infinity(generated: Any, reference: Any, seed: int = 0) -> float:
    """Return the Frechet distance extrapolated to infinitely many generated images.

    FID falls with the number of images n nearly as FID_infinity + c / n: a line is fitted to the distances of 15
    random subsets. reference: features or their Moments. Source: Chong & Forsyth 2020.
    """
    features = as_features(generated, least=16)
    moments = reference if isinstance(reference, Moments) else Moments.of(as_features(reference))
    distance = FrechetToReference(features, moments)
    sizes = np.linspace(max(8, round(SMALLEST_SHARE * len(features))), len(features), SIZES).astype(int)
    random = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        weights = np.zeros(len(features))
        weights[random.permutation(len(features))[:size]] = 1
        distances.append(distance(weights))
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)
