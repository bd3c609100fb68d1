"""Intervals of confidence by the bootstrap over images: images are drawn again with replacement (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .features import Array

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it in `LEVEL` of all repetitions, as the bootstrap estimates it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def bootstrap_weights(count: int, resamples: int, seed: int) -> Array:
    """Return (count, resamples): how often each of `count` images is drawn in each resample."""
    draws = (np.random.default_rng([seed, number]).integers(0, count, count) for number in range(resamples))
    return np.stack([np.bincount(drawn, minlength=count) for drawn in draws], axis=1).astype(np.float64)


def interval(value: float, resampled: Array) -> Estimate:
    """Return the estimate with quantiles of the resamples, moved so that their median is the value.

    A distance of resampled images is biased upwards, as that of fewer images is: without the move the interval of FID
    would often not hold FID itself.
    """
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled - np.median(resampled), [tail, 1 - tail])
    return Estimate(value, value + float(low), value + float(high))


def mean_estimate(values: Array, resamples: int, seed: int) -> Estimate:
    """Return the mean of one number per image and its interval."""
    weights = bootstrap_weights(len(values), resamples, seed)
    return interval(float(values.mean()), values @ weights / len(values))


def resampled(statistic: Callable[[Array], float], count: int, resamples: int, seed: int) -> Array:
    """Return the statistic, a function of the weights of images, of each resample."""
    weights = bootstrap_weights(count, resamples, seed)
    return np.array([statistic(column) for column in weights.T])
