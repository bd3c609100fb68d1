"""Metrics of nearest neighbours: precision, recall, density, coverage, and the search for memorised images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentsmith.files.errors import BadInput

from .features import Array, as_features, blocks, rounding, same_width, squared_distances


@dataclass(frozen=True, eq=False)
class Manifolds:
    """For each image, what precision, recall, density and coverage are the means of."""

    precise: Array  # (n,) of the generated: 1 inside any ball of the reference, else 0
    dense: Array  # (n,) of the generated: in how many balls of the reference, divided by k
    recalled: Array  # (m,) of the reference: 1 inside any ball of the generated
    covered: Array  # (m,) of the reference: 1 if its own ball has a generated image


def manifolds(generated: Any, reference: Any, k: int) -> Manifolds:
    """Compare images with balls around images that reach to the k-th nearest neighbour of the same set.

    Distances equal up to rounding count as inside, so equal sets have precision and recall 1.
    Source: Kynkäänniemi et al. 2019, equations 1 and 2; Naeem et al. 2020, equations 4 and 5.
    """
    left, right = as_features(generated, "generated"), as_features(reference, "reference")
    same_width(left, right)
    if not 1 <= k < min(len(left), len(right)):
        raise BadInput(f"k={k} nearest neighbours need more than {k} images in each set: {len(left)} and {len(right)}")
    origin = right.mean(axis=0)  # distances lose fewer digits near it
    left, right = left - origin, right - origin
    left_radii, right_radii = radii(left, k), radii(right, k)
    slack = rounding(left, right)
    precise, dense = np.zeros(len(left)), np.zeros(len(left))
    recalled, covered = np.zeros(len(right), bool), np.zeros(len(right), bool)
    for rows in blocks(len(left)):
        distances = squared_distances(left[rows], right)
        inside = distances <= right_radii + slack
        precise[rows], dense[rows] = inside.any(axis=1), inside.sum(axis=1) / k
        covered |= inside.any(axis=0)
        recalled |= (distances <= left_radii[rows, None] + slack).any(axis=0)
    return Manifolds(precise, dense, recalled.astype(np.float64), covered.astype(np.float64))


def radii(features: Array, k: int) -> Array:
    """Return the squared distance of each row to its k-th nearest other row."""
    found = np.empty(len(features))
    for rows in blocks(len(features)):
        distances = squared_distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = -1  # itself comes first
        found[rows] = np.partition(distances, k, axis=1)[:, k]
    return found


def precision_recall(generated: Any, reference: Any, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall of features (n, d), each in [0, 1]. Source: Kynkäänniemi et al. 2019."""
    found = manifolds(generated, reference, k)
    return float(found.precise.mean()), float(found.recalled.mean())


def density_coverage(generated: Any, reference: Any, k: int = 5) -> tuple[float, float]:
    """Return density (0 or more, 1 for equal distributions) and coverage in [0, 1]. Source: Naeem et al. 2020."""
    found = manifolds(generated, reference, k)
    return float(found.dense.mean()), float(found.covered.mean())


def nearest_neighbours(generated: Any, training: Any) -> tuple[Array, npt.NDArray[np.intp]]:
    """Return for each generated image the distance to the nearest training image, and that image's index."""
    left, right = as_features(generated, "generated", 1), as_features(training, "training images", 1)
    same_width(left, right)
    distances, indices = np.empty(len(left)), np.empty(len(left), dtype=np.intp)
    for rows in blocks(len(left)):
        squared = squared_distances(left[rows], right)
        indices[rows] = squared.argmin(axis=1)
        distances[rows] = np.linalg.norm(left[rows] - right[indices[rows]], axis=1)  # exact: a copy is at 0
    return distances, indices


def self_distances(features: Any) -> Array:
    """Return the distance of each image to the nearest other of its own set: what is usual among training images."""
    array = as_features(features)
    found: Array = np.sqrt(radii(array - array.mean(axis=0), 1))
    return found
